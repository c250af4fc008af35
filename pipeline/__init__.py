"""The run: Ray, disk, tracking and the command line."""

import os

# Before any OpenMP runtime starts: threads that wait for a parallel region spin for some microseconds and sleep then. On a machine
# whose cores are busy with something else, longer spinning makes two threads slower than one; on a quiet one, none at all makes
# small batches a third slower.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
