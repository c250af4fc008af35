"""The lines of docs/guides/fuxictr.md train a model of FuxiCTR, whose samples read the maps of their folds."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch

from graphhash.nn.embedding import BucketEmbedding

pytest.importorskip("fuxictr", reason="no FuxiCTR: pip install --no-deps fuxictr h5py")
DIM, N_USERS, N_ITEMS = 8, 301, 201


def fuxictr_model(tmp_path):
    from fuxictr.features import FeatureMap
    from fuxictr.pytorch.layers import FeatureEmbedding, MLP_Block
    from fuxictr.pytorch.models import BaseModel

    features = FeatureMap("toy", str(tmp_path))
    spec = {"source": "", "type": "categorical"}
    features.features = OrderedDict(
        user=spec | {"vocab_size": N_USERS}, item=spec | {"vocab_size": N_ITEMS}, fold={"source": "", "type": "meta"}
    )
    features.labels = ["label"]

    class Model(BaseModel):
        def __init__(self):
            super().__init__(features, verbose=0, model_root=str(tmp_path), metrics=["AUC"])
            self.embedding_layer = FeatureEmbedding(features, DIM)
            self.mlp = MLP_Block(2 * DIM, hidden_units=[16], output_dim=1, output_activation=self.output_activation)

        def forward(self, inputs):
            for name in ("user", "item"):
                self.embedding_layer.embedding_layer.embedding_layers[name].fold = (
                    inputs["fold"] if self.training else None
                )
            return {"y_pred": self.mlp(self.embedding_layer(self.get_inputs(inputs), flatten_emb=True))}

    return Model()


def test_fuxictr_trains_with_a_compressed_table_by_folds(pairs, run_block, tmp_path):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    # Encoded ids start at 1; the samples that are not clicked are drawn at random.
    clicked_users, clicked_items = pairs[0] + 1, pairs[1] + 1
    n = len(clicked_users)
    fold = rng.integers(0, 5, 2 * n)
    data = {
        "user": torch.from_numpy(np.concatenate([clicked_users, clicked_users])),
        "item": torch.from_numpy(np.concatenate([clicked_items, rng.integers(1, N_ITEMS, n)])),
        "fold": torch.from_numpy(fold),
        "label": torch.cat([torch.ones(n), torch.zeros(n)]),
    }
    model = fuxictr_model(tmp_path)
    sizes = {"n_users": N_USERS, "n_items": N_ITEMS}
    run_block("fuxictr.md", model=model, users=clicked_users, items=clicked_items, folds=fold[:n], sizes=sizes, dim=DIM)
    layer = model.embedding_layer.embedding_layer.embedding_layers["user"]
    assert isinstance(layer, BucketEmbedding)
    assert layer.n_folds == 5
    model.compile("adam", "binary_crossentropy", 0.01)
    model._max_gradient_norm = 10.0
    model.train()
    losses = []
    for _ in range(60):
        batch = torch.from_numpy(rng.integers(0, 2 * n, 1024))
        losses.append(float(model.train_step({name: values[batch] for name, values in data.items()})))
    assert np.mean(losses[-10:]) < losses[0] - 0.02
    sample = {name: values[:50] for name, values in data.items()}
    model.train()(sample)
    by_fold = layer(sample["user"])
    assert torch.equal(layer.fold, sample["fold"])
    model.eval()(sample)
    assert layer.fold is None
    assert not torch.equal(layer(sample["user"]), by_fold)
