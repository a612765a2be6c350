"""Weight sync: what the stream must hold, and the canary that notices when it went wrong."""

from pathlib import Path

import pytest
import torch

from kaja.checkpoint import load_model
from kaja.engine import TorchEngine
from kaja.errors import UserError
from kaja.model import CausalLM
from kaja.sync import check_sync, sequence_log_probs, sync_error
from conftest import make_model_folder

PROBE = [[1, 5, 9, 30, 7], [8], [3, 3]]


@pytest.fixture
def policy(model_folder: Path) -> CausalLM:
    return load_model(model_folder)


@pytest.fixture
def engine(model_folder: Path) -> TorchEngine:
    return TorchEngine(load_model(model_folder), [2], 64)


@torch.no_grad()
def train(policy: CausalLM) -> None:
    for parameter in policy.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))


def test_log_probs_of_sequences(policy: CausalLM) -> None:
    scores = sequence_log_probs(policy, PROBE)
    assert [len(score) for score in scores] == [4, 0, 1]
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32)
    hidden = policy(torch.tensor(PROBE[0]), torch.arange(5), cu_seqlens)
    logits = (hidden @ policy.lm_head.weight.t()).double().log_softmax(-1)
    expected = logits[range(4), PROBE[0][1:]]
    torch.testing.assert_close(torch.tensor(scores[0]).double(), expected, rtol=0, atol=1e-5)


def test_a_sync_is_exact_and_a_skipped_one_is_noticed(policy: CausalLM, engine: TorchEngine) -> None:
    assert check_sync(engine, policy, PROBE, tolerance=1e-5) < 1e-5
    train(policy)
    assert sync_error(engine, policy, PROBE) > 1e-2
    with pytest.raises(UserError, match="does not hold the trainer's weights"):
        check_sync(engine, policy, PROBE, tolerance=1e-3)
    engine.load_weights(policy.state_dict().items())
    assert check_sync(engine, policy, PROBE, tolerance=1e-5) < 1e-5


def test_not_a_number_is_noticed(policy: CausalLM, engine: TorchEngine) -> None:
    with torch.no_grad():
        policy.model.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="nan"):
        check_sync(engine, policy, PROBE, tolerance=1e9)


def test_wrong_streams_are_refused_until_a_whole_one_comes(policy: CausalLM, engine: TorchEngine) -> None:
    whole = dict(policy.state_dict())
    partial = {name: tensor for name, tensor in whole.items() if "layers.1" not in name}
    wrong = [
        (partial, "9 of 21 tensors are missing, the first is model.layers.1.input_layernorm.weight"),
        ({**whole, "model.extra.weight": torch.zeros(1)}, "no model.extra.weight"),
        ({**whole, "model.norm.weight": torch.zeros(7)}, r"norm.weight is \(7,\), the engine's model has \(32,\)"),
    ]
    for tensors, message in wrong:
        with pytest.raises(UserError, match=message):
            engine.load_weights(tensors.items())
        with pytest.raises(RuntimeError, match="incomplete"):
            engine.generate([[1]], max_tokens=1, seeds=[0])
        with pytest.raises(RuntimeError, match="incomplete"):
            engine.score([[1, 2]])
    engine.load_weights(whole.items())
    assert sync_error(engine, policy, PROBE) < 1e-5


def test_a_stream_that_breaks_off_is_not_forgotten(policy: CausalLM, engine: TorchEngine) -> None:
    def broken():
        yield next(iter(policy.state_dict().items()))
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        engine.load_weights(broken())
    with pytest.raises(RuntimeError, match="did not finish"):
        engine.score([[1, 2]])


def test_tied_head_with_and_without_its_name(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "tied", tie_word_embeddings=True)
    policy, engine = load_model(folder), TorchEngine(load_model(folder), [2], 64)
    for named in (lambda: policy.state_dict().items(), policy.named_parameters):
        train(policy)
        assert sync_error(engine, policy, PROBE) > 1e-2
        engine.load_weights(named())
        assert sync_error(engine, policy, PROBE) < 1e-5
        assert engine.model.lm_head.weight is engine.model.model.embed_tokens.weight
