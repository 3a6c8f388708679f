"""Statistics gathered block by block are those of the whole model with hooks."""

from __future__ import annotations

import pytest
import torch

import networks as n

FAMILIES = ["llama", "gpt2", "bert", "mixtral", "qwen3-moe", "qwen2-moe", "opt", "gemma2", "gpt-neox"]


@pytest.mark.parametrize("family", FAMILIES)
def test_gram_and_means(family: str) -> None:
    wanted = n.layer_inputs(n.whole(family), n.ids())
    found = {}
    with n.opened(family, needs=("gram", "mean", "mean_abs", "inputs"), head=True) as calibration:
        for session in calibration.blocks():
            for stage in session.stages:
                found.update(session.gather(stage, ("gram", "mean", "mean_abs", "inputs")))
        last, output = session.names[-1], calibration.host.model.get_output_embeddings()
        place = {id(module): name for name, module in calibration.host.model.named_modules()}
        assert session.index == len(calibration.host.blocks)  # the output layer, tied to the embedding or not
    for name, statistics in found.items():
        rows = wanted[place[id(output)] if name == last else n.reference_name(name, wanted)]
        assert int(statistics["tokens"]) == len(rows), name
        assert n.close(statistics["gram"], n.gram(rows)), name
        assert torch.equal(statistics["gram"], statistics["gram"].T)
        assert n.close(statistics["mean"], rows.mean(0), 1e-4), name
        assert n.close(statistics["mean_abs"], rows.abs().mean(0)), name
        assert len(statistics["inputs"]) == min(512, len(rows))


@pytest.mark.parametrize("family", ["gpt-oss", "llama4"])
def test_experts_of_stacked_families(family: str) -> None:
    """Every token goes to as many experts as the router says, and a down projection sees what its gate made."""
    import transformers

    if not hasattr(transformers, n.FAMILIES[family][1]):
        pytest.skip(f"this transformers has no {family}")
    with n.opened(family) as calibration:
        session = next(calibration.blocks())
        found = session.gather(session.names, ("gram", "inputs"))
        experts = [name for name, layer in session.layers.items() if layer.expert is not None]
        ups = [name for name in experts if "gate_up" in name]
        assert len(ups) == 4
        chosen = calibration.host.model.config.get_text_config().num_experts_per_tok
        assert sum(int(found[name]["tokens"]) for name in ups) == chosen * n.ids().numel()
        for name in ups:
            down = name.replace("gate_up_proj", "down_proj")
            assert int(found[down]["tokens"]) == int(found[name]["tokens"])
            rows = found[name]["inputs"]
            assert len(rows) == int(found[name]["tokens"])
            assert n.close(found[name]["gram"], n.gram(rows))
        assert session.stages[-1] != session.stages[0]


def test_layers_of_a_group_share_tensors() -> None:
    with n.opened("llama") as calibration:
        session = next(calibration.blocks())
        found = session.gather(session.names, ("gram",))
        query, key, _ = session.groups[0]
        assert found[query]["gram"] is found[key]["gram"]
        assert set(found[query]) == {"gram", "tokens"}  # only what was declared


def test_held_out_windows_enter_nothing_else() -> None:
    settings = n.SMALL.model_copy(update={"held_out": 0.34})
    seen, held = n.ids()[:4], n.ids()[4:]
    model = n.whole("llama")
    with n.opened("llama", settings, needs=("gram", "held_out_gram")) as calibration:
        session = next(calibration.blocks())
        assert sum(map(len, session.inputs)) == 4
        assert sum(map(len, session.held_out_inputs)) == 2
        name = session.names[0]
        found = session.gather([name], ("gram", "held_out_gram", "tokens"))[name]
    assert n.close(found["gram"], n.gram(n.layer_inputs(model, seen)[name]))
    assert n.close(found["held_out_gram"], n.gram(n.layer_inputs(model, held)[name]))
    assert int(found["tokens"]) == seen.numel()


def test_padding_leaves_no_trace() -> None:
    windows, mask = n.ids(), torch.ones(6, 16, dtype=torch.int64)
    mask[1, 10:] = 0
    mask[4, 3:] = 0
    found = []
    for fill in (5, 77):
        padded = windows.masked_fill(mask == 0, fill)
        with n.opened("llama", windows=padded, attention_mask=mask, needs=("gram", "mean")) as calibration:
            for session in calibration.blocks():
                statistics = session.gather(session.names, ("gram", "mean"))
        found.append(statistics[session.names[-1]])
    assert int(found[0]["tokens"]) == int(mask.sum())
    assert n.close(found[0]["gram"], found[1]["gram"], 1e-5)
    assert n.close(found[0]["mean"], found[1]["mean"], 1e-5)


def test_batches_do_not_change_the_statistics() -> None:
    found = []
    for tokens in (16, 48, 4096):
        settings = n.SMALL.model_copy(update={"batch_tokens": tokens})
        with n.opened("mixtral", settings, needs=("gram",)) as calibration:
            for session in calibration.blocks():
                statistics = session.gather(session.names, ("gram",))
        found.append(statistics)
    for name in found[0]:
        assert n.close(found[0][name]["gram"], found[1][name]["gram"])
        assert n.close(found[0][name]["gram"], found[2][name]["gram"])


def test_one_block_in_memory() -> None:
    with n.opened("llama") as calibration:
        blocks = calibration.host.blocks
        for session in calibration.blocks():
            loaded = [i for i, b in enumerate(blocks) if not any(p.is_meta for p in b.parameters())]
            assert loaded == [session.index]
            assert all(p.is_meta for i, b in enumerate(blocks) if i != session.index for p in b.parameters())
    assert all(p.is_meta for b in blocks for p in b.parameters())


def test_bfloat16_forward_gives_float32_statistics() -> None:
    settings = n.SMALL.model_copy(update={"dtype": "bfloat16"})
    rows = n.layer_inputs(n.whole("llama"), n.ids())
    with n.opened("llama", settings) as calibration:
        for session in calibration.blocks():
            found = session.gather(session.names, ("gram",))
    name = session.names[-1]
    assert found[name]["gram"].dtype == torch.float32
    assert n.close(found[name]["gram"], n.gram(rows[name]), 0.05)
