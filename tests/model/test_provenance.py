"""Content credentials: what is signed stays verifiable, and any change of it shows."""

from __future__ import annotations

import random
import stat
from pathlib import Path

import pytest
import torch

from model import provenance
from model.provenance import ProvenanceError, sign, verify
from model.video import read_image, read_video, write_image, write_video

ABOUT = {"prompt": "a red circle moving right", "seed": 3, "guidance": 6.0}


@pytest.fixture
def keys(signing_keys):
    return signing_keys


@pytest.fixture
def signed(tmp_path, keys):
    path = tmp_path / "clip.mp4"
    write_video(path, torch.rand(3, 5, 32, 48, generator=torch.manual_seed(0)) * 2 - 1)
    before = read_video(path)[0]
    sign(path, ABOUT, keys)
    assert torch.equal(read_video(path)[0], before)  # only metadata were added
    return path


def boxes(content: bytes) -> dict[str, range]:
    """Byte range of the content of every box of an MP4."""
    found, at = {}, 0
    while at < len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        found[content[at + 4 : at + 8].decode()] = range(at + 8, at + size)
        at += size
    return found


def test_signed_video_is_valid_but_its_signer_is_not_trusted(signed):
    verdict = verify(signed)
    assert (verdict.state, verdict.trusted, verdict.reasons) == ("valid", False, ())
    assert verdict.about == ABOUT
    assert list(signed.parent.iterdir()) == [signed]


@pytest.mark.parametrize("box", ["mdat", "moov"])
def test_every_flipped_bit_of_the_pictures_shows(signed, box):
    content, dice = signed.read_bytes(), random.Random(7)
    for _ in range(12):
        changed = bytearray(content)
        changed[dice.choice(boxes(content)[box])] ^= 1 << dice.randrange(8)
        signed.write_bytes(changed)
        verdict = verify(signed)
        assert verdict.state == "invalid"
        if box == "mdat":  # in moov the file may also stop being an MP4
            assert verdict.reasons == ("assertion.bmffHash.mismatch",)


def test_changed_claims_show(signed):
    content = signed.read_bytes()
    assert content.count(b"red circle") == 1
    signed.write_bytes(content.replace(b"red circle", b"red square"))
    assert verify(signed).state == "invalid"


def test_picture(tmp_path, keys):
    path = tmp_path / "picture.png"
    write_image(path, torch.rand(3, 1, 16, 24) * 2 - 1)
    assert verify(path).state == "unsigned"
    before = read_image(path)
    sign(path, ABOUT, keys)
    assert verify(path).about == ABOUT and torch.equal(read_image(path), before)
    content = path.read_bytes()
    at = content.index(b"IDAT") + 9
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    assert verify(path).state == "invalid"


def test_keys_are_made_once_and_kept_secret(tmp_path, signed):
    folder = tmp_path / "new" / "keys"
    sign(signed, ABOUT, folder)
    first = (folder / provenance.KEY).read_bytes()
    assert stat.S_IMODE((folder / provenance.KEY).stat().st_mode) == 0o600
    sign(signed, ABOUT, folder)
    assert (folder / provenance.KEY).read_bytes() == first
    assert verify(signed).state == "valid"


def test_default_keys_follow_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SORA_KERNELS_KEYS", str(tmp_path))
    assert provenance.default_keys() == tmp_path
    monkeypatch.delenv("SORA_KERNELS_KEYS")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert provenance.default_keys() == tmp_path / "sora_kernels" / "keys"


@pytest.mark.parametrize("content", [b"", b"no video at all", None])
def test_what_cannot_be_signed_is_left_alone(tmp_path, keys, content):
    path = tmp_path / "clip.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ProvenanceError, match="clip.mp4"):
        sign(path, ABOUT, keys)
    assert (path.read_bytes() if path.exists() else None) == content
    assert set(tmp_path.iterdir()) <= {path}


def test_a_key_without_its_chain_is_named_not_replaced(signed, tmp_path):
    folder = tmp_path / "half"
    folder.mkdir()
    (folder / provenance.KEY).write_text("mine")
    content = signed.read_bytes()
    with pytest.raises(ProvenanceError, match="half"):
        sign(signed, ABOUT, folder)
    assert signed.read_bytes() == content
    assert [path.name for path in folder.iterdir()] == [provenance.KEY]


def test_other_files_are_refused(tmp_path, keys):
    for act in (lambda path: sign(path, {}, keys), verify):
        with pytest.raises(ProvenanceError, match=r"path: .*\.mp4 or \.png, got clip\.avi"):
            act(tmp_path / "clip.avi")
    with pytest.raises(ProvenanceError, match="no such file"):
        verify(tmp_path / "absent.mp4")


def test_command(signed, capsys):
    provenance.main(["verify", str(signed)])
    out = capsys.readouterr().out
    assert "valid" in out and "prompt: a red circle moving right" in out
    content = bytearray(signed.read_bytes())
    content[boxes(content)["mdat"][40]] ^= 1
    signed.write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        provenance.main(["verify", str(signed)])
    assert stopped.value.code == 1
    assert "invalid (assertion.bmffHash.mismatch)" in capsys.readouterr().out
    write_video(Path(signed), torch.zeros(3, 1, 16, 16))
    with pytest.raises(SystemExit):
        provenance.main(["verify", str(signed)])
    assert "unsigned" in capsys.readouterr().out
