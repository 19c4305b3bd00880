"What several test files use."
import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    "Two test processes on two cores: each keeps to one. A file asks for it by `pytestmark = pytest.mark.usefixtures('one_thread')`."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
