"""The options of runs that commands share: where the run folder is, budgets, clustering, training and export.

An option is declared once, in a group of related ones; `pipeline.cli.settings` names the settings that it sets, and
`pipeline.cli.log_options` holds the options of the log.
"""

from __future__ import annotations

import click

from pipeline.cli.command import group
from pipeline.cli.output import json_option
from pipeline.config.choices import AUTO_LOSS, CLUSTER_METHODS, CTR_MODELS, LOSSES, MODELS, PRECISIONS, RUNTIMES

out_option = group(
    click.option(
        "--out", required=True, metavar="DIR", help="The run folder, or its URI (s3://...); created if missing."
    ),
    click.option(
        "--work",
        metavar="DIR",
        envvar="GRAPHHASH_WORK",
        help="With --out at a URI: the working copy; all machines of a cluster must see it.  [a temporary folder]",
    ),
)
seed_option = click.option("--seed", type=int, help="Seeds the split, the bucket maps and the training.  [0]")
settings_options = group(
    click.option("--config", "config_file", metavar="FILE", help="TOML file of settings; options override it."),
    click.option(
        "--address",
        metavar="ADDR",
        help="Ray cluster to use (auto, host:port or ray://...).  [this machine; a local Ray starts where it is needed]",
    ),
    json_option("the printed figures"),
    click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]..."),
)
common_options = group(seed_option, settings_options)
budget_options = group(
    click.option(
        "--ratio",
        type=float,
        help="Budget in bytes: of everything kept, as a share of the uncompressed tables; ctr: of the whole model.  "
        "[0.25; ctr: --resolution 5]",
    ),
    click.option("--rows", type=int, help="Budget in rows: of user and item table together, exactly; 4 or more."),
    click.option(
        "--user-rows", type=int, help="Budget in rows of the user table, exactly; with --item-rows; 2 or more."
    ),
    click.option(
        "--item-rows", type=int, help="Budget in rows of the item table, exactly; with --user-rows; 2 or more."
    ),
    click.option(
        "--resolution",
        type=float,
        help="Instead of a budget: resolution of the modularity; a higher one gives more rows.  [ctr: 5]",
    ),
)
clustering_options = group(
    click.option(
        "--cluster-method",
        type=click.Choice(CLUSTER_METHODS),
        help="leiden: connected communities, slower; lpa: label propagation, faster, lower modularity; balanced: BACO.  [louvain]",
    ),
    click.option(
        "--levels",
        metavar="G[,G]...",
        help="Also write nested communities at these resolutions, with raw ids: cluster/levels_users.parquet, levels_items.parquet.",
    ),
    click.option("--max-size", type=int, help="Maximum number of users, and of items, in a community.  [no bound]"),
    click.option("--threads", type=int, help="Threads of the clustering.  [one per core]"),
    click.option(
        "--shards",
        type=int,
        help="Cluster in Ray tasks over this many shards of the graph, with the same result.  [0: in one process]",
    ),
)
cluster_options = group(budget_options, clustering_options)
METHOD_NAMES = (
    "soft, double_soft, residual, graph, double_graph, multilevel; baco, modulo, double, quotient_remainder, "
    "frequency, double_frequency, lsh, lsh_structure; full, full_float16, full_int8, full_int4, full_pq, full_opq, "
    "full_small_dim; full_soft, full_soft_int8, full_soft_int4, full_soft_pq, additive, full_additive, "
    "full_soft_small_dim (CTR); cce, cafe, robe, dhe."
)
method_option = click.option(
    "--method",
    metavar="NAME[,NAME]...",
    help=f"{METHOD_NAMES}  [by ratio, model, loss and density: soft, residual, additive or full_additive; "
    "ctr: soft or full_soft_small_dim]",
)
model_options = group(
    click.option(
        "--model",
        type=click.Choice((*MODELS, *CTR_MODELS)),
        help="retrieval: mf, neumf or lightgcn; ctr: one of the others.  [mf; ctr: dlrm]",
    ),
    click.option(
        "--loss",
        type=click.Choice((*LOSSES, AUTO_LOSS)),
        help="All but bpr need mf or lightgcn, which have a vector per id.  [by the log: bpr, or softmax or bsl for mf]",
    ),
)
training_options = group(
    click.option(
        "--indices-per-id", type=int, help="Table rows read per id: the number of hash functions.  [the method's]"
    ),
    click.option(
        "--item-bias/--no-item-bias", default=None, help="Train a bias per item.  [by method, loss and graph]"
    ),
    click.option("--dim", type=int, help="Embedding dimension.  [64]"),
    click.option(
        "--lr", type=float, help="Initial learning rate of Adam; it falls to 0 over the epochs.  [the method's]"
    ),
    click.option("--weight-decay", type=float, help="Weight decay of Adam.  [the method's]"),
    click.option(
        "--epochs", type=int, help="Maximum number of epochs; early stopping may end training before.  [the model's]"
    ),
    click.option("--batch-size", type=int, help="Examples per step; 0: all of them.  [the model's]"),
    click.option(
        "--mlflow/--no-mlflow", default=None, help="Track the run in MLFLOW_TRACKING_URI, or else ./mlflow.db.  [on]"
    ),
)
workers_option = click.option("--workers", type=int, help="Data-parallel training processes.  [one per GPU, or one]")
train_options = group(method_option, model_options, training_options, workers_option)
cutoff_option = click.option(
    "--k",
    metavar="K[,K]...",
    help="Cut-offs of recall, NDCG, hit rate, MRR and coverage on the test; the first is that of tables.  [20]",
)
resume_option = click.option(
    "--resume/--no-resume",
    default=None,
    help="--resume: continue from a checkpoint, and fail without one; --no-resume: start over.  [continue if there is one]",
)
# Precision and runtime of the bundle.
export_options = group(
    click.option(
        "--precision",
        type=click.Choice(PRECISIONS),
        help="Number type of the stored tables.  [auto: float32 for full, int4 for soft maps, else int8; ctr: float32 for full, else "
        "int8, or int4 with --ratio below .25]",
    ),
    click.option(
        "--runtime",
        type=click.Choice(RUNTIMES),
        help="What serving keeps in memory. materialized: a float32 vector per item, fastest; compressed: the small tables alone, and"
        " requests take two times (1 user) to five times (256 users) as long.  [auto: materialized where that takes up to 4 GiB]",
    ),
)
