"""Signing keys of the tests' own: nothing of the user's is read or written."""

from __future__ import annotations

import pytest

from model.provenance import make_keys


@pytest.fixture(scope="session", autouse=True)
def signing_keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signing_keys")
    make_keys(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SORA_KERNELS_KEYS", str(folder))
        yield folder
