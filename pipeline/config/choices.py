"""The words that a setting may be, as types and as tuples.

They are spelt out here, and not imported from the code that they choose, because that code imports PyTorch or SciPy.
"""

from __future__ import annotations

from typing import Literal, get_args

Task = Literal["retrieval", "ctr"]
RetrievalFormat = Literal["auto", "lightgcn", "movielens-100k", "movielens-1m", "csv", "tsv", "parquet"]
PublishedCtr = Literal["frappe_x1", "movielenslatest_x1", "criteo_x1", "criteo_x4", "avazu_x1", "avazu_x4"]
CtrFormat = Literal["libfm", "frappe", "avazu", PublishedCtr]
Format = Literal[RetrievalFormat, CtrFormat]
IdKind = Literal["auto", "int64", "string"]
Split = Literal["random", "given", "temporal", "leave-last-out"]
ClusterMethod = Literal["louvain", "leiden", "lpa", "balanced"]
SoftHops = Literal["1", "2", "1+2"]
RetrievalModel = Literal["mf", "neumf", "lightgcn"]
CtrModel = Literal["widedeep", "deepfm", "dcnv2", "dlrm", "finalnet"]
Model = Literal[RetrievalModel, CtrModel]
Loss = Literal["bpr", "softmax", "bsl", "ccl", "directau", "ials"]
# The loss that the size of the log decides.
AUTO_LOSS: Literal["auto"] = "auto"
# The methods of a run that chooses one by itself.
AUTO_METHODS = ("auto",)
LossChoice = Literal[Loss, "auto"]
Sampler = Literal["uniform", "uniform_rejecting", "popularity", "in_batch"]
Schedule = Literal["constant", "cosine"]
Score = Literal["auc", "log_loss"]
Precision = Literal["auto", "float32", "float16", "int8", "int4"]
Runtime = Literal["auto", "materialized", "compressed"]

TASKS: tuple[str, ...] = get_args(Task)
FORMATS: tuple[str, ...] = get_args(Format)
CTR_FORMATS: tuple[str, ...] = get_args(CtrFormat)
ID_KINDS: tuple[str, ...] = get_args(IdKind)
SPLITS: tuple[str, ...] = get_args(Split)
CLUSTER_METHODS: tuple[str, ...] = get_args(ClusterMethod)
HOPS: tuple[str, ...] = get_args(SoftHops)
MODELS: tuple[str, ...] = get_args(RetrievalModel)
CTR_MODELS: tuple[str, ...] = get_args(CtrModel)
LOSSES: tuple[str, ...] = get_args(Loss)
# Losses whose negatives a batch shares; they are of cosines.
SHARED_LOSSES: tuple[str, ...] = ("softmax", "bsl", "ccl")
SAMPLERS: tuple[str, ...] = get_args(Sampler)
PRECISIONS: tuple[str, ...] = get_args(Precision)
RUNTIMES: tuple[str, ...] = get_args(Runtime)
