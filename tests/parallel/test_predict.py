"""What is no image is not predicted; the predictions themselves are in test_counted.py."""

from __future__ import annotations

from pathlib import Path

from tests.parallel.conftest import Launch, checkpoint_file


def test_no_images_and_bad_images(launch: Launch, trained: Path, tmp_path: Path) -> None:
    best = checkpoint_file(trained, "best.json")
    (tmp_path / "patches").mkdir()
    for content, message in ((None, "has no images"), (b"text", "not a readable JPEG, PNG, TIFF, WebP or BMP image")):
        if content:
            (tmp_path / "patches" / "a.jpg").write_bytes(content)
        arguments = ("--checkpoint", best, "--input", tmp_path / "patches", "--out", tmp_path / "out")
        job = launch("python", 1, "predict", *arguments)
        assert job.returncode == 2
        assert message in job.stderr
        assert not (tmp_path / "out").exists()
