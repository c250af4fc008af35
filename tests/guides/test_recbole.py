"""The lines of docs/guides/recbole.md train RecBole's own models, and rank better than chance."""

from __future__ import annotations

import pytest

from graphhash.nn.embedding import BucketEmbedding

pytest.importorskip("recbole", reason="no RecBole: pip install --no-deps recbole colorlog colorama texttable thop")


@pytest.mark.parametrize("name", ["BPR", "LightGCN"])
def test_recbole_trains_and_evaluates_with_a_compressed_table(name, pairs, run_block, tmp_path, monkeypatch):
    # RecBole writes its logs into the working directory.
    monkeypatch.chdir(tmp_path)
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.trainer import Trainer
    from recbole.utils import get_model, init_seed

    folder = tmp_path / "toy"
    folder.mkdir()
    rows = "\n".join(f"{user}\t{item}" for user, item in zip(*pairs, strict=True))
    (folder / "toy.inter").write_text(f"user_id:token\titem_id:token\n{rows}\n")
    settings = {
        "data_path": str(tmp_path), "checkpoint_dir": str(tmp_path), "load_col": {"inter": ["user_id", "item_id"]},
        "USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "use_gpu": False, "epochs": 3, "learning_rate": 0.01,
        "train_batch_size": 512, "show_progress": False, "metrics": ["Recall"], "topk": [10], "valid_metric": "Recall@10",
        "eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "RO", "group_by": "user", "mode": "full"},
    }  # fmt: skip
    config = Config(model=name, dataset="toy", config_dict=settings)
    init_seed(0, True)
    dataset = create_dataset(config)
    train_data, valid_data, test_data = data_preparation(config, dataset)
    try:
        model = get_model(name)(config, train_data.dataset)
    except AttributeError as error:
        pytest.skip(f"RecBole's {name} does not run with the SciPy that is installed ({error})")
    full = sum(p.numel() for p in model.parameters())
    run_block("recbole.md", config=config, dataset=dataset, train_data=train_data, model=model)
    assert isinstance(model.user_embedding, BucketEmbedding)
    assert sum(p.numel() for p in model.parameters()) < 0.2 * full
    trainer = Trainer(config, model)
    trainer.fit(train_data, valid_data, show_progress=False, saved=False)
    recall = trainer.evaluate(test_data, load_best_model=False)["recall@10"]
    # Ten of 200 items at random find a twentieth.
    assert recall > 0.15
