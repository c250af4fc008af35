"""The run: Ray, disk, tracking and the command line."""

import os

# Before any OpenMP runtime starts: threads that wait for a parallel region sleep instead of spinning. On a machine whose cores
# are busy with something else, spinning makes two threads slower than one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
