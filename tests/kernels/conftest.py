"""Every test here runs with fresh memory full of NaN, so that reading an unwritten row is noticed."""

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.triton_case import correct_bf16_in_the_interpreter

if not torch.cuda.is_available():
    correct_bf16_in_the_interpreter()


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch's deterministic mode fills uninitialised memory with NaN; one thread, so that sums keep their order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of Triton kernels are GPU tests where there is a GPU."""
    for item in items:
        if "_triton" in item.path.name and item.path.parent.name == "kernels" and torch.cuda.is_available():
            item.add_marker(pytest.mark.gpu)
