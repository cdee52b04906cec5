"""What each node costs: seconds forward and backward, and bytes.

The captured graph is run node by node on the sample microbatch, and each node's backward on its own. Equal operations
on equal shapes are timed once. A model without memory (on the meta device), or for a device that is not here, is
*counted* instead: the same walk on fake tensors, with seconds from operations and bytes moved over a device's roofline.

Where operations are timed, so are the links between the devices (``links.py``).

Bytes are counted by storage: views share that of their base, and what several nodes keep is kept once.
"""

from pipecompile.profile.links import with_measured_links as with_measured_links
from pipecompile.profile.meters import How as How
from pipecompile.profile.optimizer_state import optimizer_state as optimizer_state
from pipecompile.profile.profiler import profile as profile
