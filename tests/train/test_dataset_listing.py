"""`--debug_dataset`: what would be trained on, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import TinyModels, make_tiny_dataset
from trainer.__main__ import main
from trainer.schema.cli import parse_command_line
from trainer.train.check import check_run
from trainer.train.dataset_listing import dataset_listing
from trainer.train.reporting import Reporter


def words(models: TinyModels, folder: Path) -> list[str]:
    dataset = make_tiny_dataset(folder, count=3)
    for number, path in enumerate(sorted((folder / "images").glob("*.txt"))):
        path.write_text(f"thing {number}, a, b, c\n", encoding="utf-8")
    return [
        *models.arguments(),
        f"--dataset_config={dataset}",
        f"--output_dir={folder / 'out'}",
        "--device=cpu",
        "--seed=5",
        "--network_train_unet_only",
        "--max_train_epochs=2",
        "--shuffle_caption",
        "--keep_tokens=1",
        "--flip_aug",
        "--caption_prefix=new",
        "--debug_dataset",
    ]


def test_every_draw_is_printed_with_its_caption_and_nothing_is_trained(
    tiny_models: TinyModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = words(tiny_models, tmp_path)
    command = parse_command_line(arguments)
    checked = check_run(command, Reporter(is_main=False))
    listing = "\n".join(dataset_listing(checked))
    num_draws = sum(item.num_repeats for item in checked.index.items)
    assert listing.count(str(tmp_path / "images")) == num_draws
    assert listing.count("batch ") == checked.index.num_batches_per_epoch
    for number in range(3):
        assert f'"new thing {number}, ' in listing
    assert "mirrored" in listing

    capsys.readouterr()
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert all(line in printed.out + printed.err for line in listing.splitlines())
    assert "nothing is trained" in printed.out + printed.err
    assert not (tmp_path / "out").exists()
