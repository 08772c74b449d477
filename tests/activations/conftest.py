"""A tiny random model, made in memory."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def lm(make_lm):
    return make_lm()
