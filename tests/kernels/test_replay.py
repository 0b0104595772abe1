"""replay: a recomputation takes the recorded results in order, and refuses other calls and changed tensors."""

import threading

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trinity_kernels.replay import Results, kept

ran: list[str] = []


def first(x: Tensor) -> Tensor:
    ran.append("first")
    return x + len(ran)


def second(x: Tensor, by: int = 1) -> tuple[Tensor, None]:
    ran.append("second")
    return x * by, None


@pytest.fixture(autouse=True)
def nothing_ran() -> None:
    ran.clear()


def both(x: Tensor) -> tuple[Tensor, Tensor]:
    return kept(first, x), kept(second, x, by=3)[0]


def test_a_recomputation_takes_the_recorded_tensors() -> None:
    x, results = torch.ones(3), Results()
    with results.recording():
        forward = both(x)
    for _ in range(2):
        with results.replaying():
            again = both(x)
        assert all(a is b for a, b in zip(forward, again))
    assert ran == ["first", "second"]
    both(x)
    assert len(ran) == 4


def test_contexts_nest() -> None:
    """A recomputation inside another forward pass, as backward may start one."""
    x, inner, outer = torch.ones(3), Results(), Results()
    with inner.recording():
        one = kept(first, x)
    with outer.recording():
        two = kept(first, x)
        with inner.replaying():
            assert kept(first, x) is one
        three = kept(first, x)
    with outer.replaying():
        assert kept(first, x) is two
        assert kept(first, x) is three


def test_an_error_ends_the_context() -> None:
    results = Results()
    with pytest.raises(KeyError), results.recording():
        raise KeyError
    kept(first, torch.ones(1))
    with results.replaying(), pytest.raises(RuntimeError, match="call 0 of recomputation"):
        kept(first, torch.ones(1))


def test_other_calls_than_in_forward_are_refused() -> None:
    x, results = torch.ones(3), Results()
    with results.recording():
        kept(first, x)
    with results.replaying(), pytest.raises(RuntimeError, match=r"call 0 of recomputation, of .*second.*, is not"):
        kept(second, x)


def test_a_changed_result_is_refused() -> None:
    x, results = torch.ones(3), Results()
    with results.recording():
        kept(second, x)[0].add_(1)
    with results.replaying(), pytest.raises(RuntimeError, match="changed in place"):
        kept(second, x)


def test_other_threads_are_not_recorded() -> None:
    results = Results()
    with results.recording():
        thread = threading.Thread(target=kept, args=(first, torch.ones(1)))
        thread.start()
        thread.join()
    with results.replaying(), pytest.raises(RuntimeError, match="call 0"):
        kept(first, torch.ones(1))


def test_a_checkpoint_backward_twice() -> None:
    """With the graph retained, both recomputations take the recorded results: `first` differs from call to call."""

    def contexts() -> tuple:
        results = Results()
        return results.recording(), results.replaying()

    def function(x: Tensor) -> Tensor:
        return (x * kept(first, torch.zeros(()))).square()

    x = torch.tensor(3.0, requires_grad=True)
    y = checkpoint(function, x, use_reentrant=False, context_fn=contexts)
    grads = [torch.autograd.grad(y, x, retain_graph=True)[0].item() for _ in range(2)]
    assert grads == [6.0, 6.0]
    assert ran == ["first"]
