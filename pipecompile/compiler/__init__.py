"""From a call to what runs it: options, captures, the compilation of one call, its rehearsal and report."""
