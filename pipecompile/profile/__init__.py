"""Profiles each node: seconds forward and backward, and bytes.

The captured graph is run node by node on the sample microbatch, with the backward of each node on its own. Equal
operations on equal shapes are timed once. A model on the meta device, or for a device that is not available, is
*counted* instead: the same walk on fake tensors, with seconds from the roofline of a device.

If operations are timed, so are the links between the devices (``links.py``).

Bytes are counted by storage: views share the storage of their base, and a storage that several nodes keep counts once.
"""

from pipecompile.profile.links import with_measured_links as with_measured_links
from pipecompile.profile.meters import How as How
from pipecompile.profile.optimizer_state import optimizer_state as optimizer_state
from pipecompile.profile.profiler import profile as profile
from pipecompile.profile.update_cost import update_cost as update_cost
