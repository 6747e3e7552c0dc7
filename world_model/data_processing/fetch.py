r"""Get the published data: ETO's expert dialogues from the Hugging Face hub, its lists of ScienceWorld's games from its
repository, ALFWorld's games by alfworld's own tool.

    python -m world_model.data_processing.fetch --out_dir data                   # everything
    python -m world_model.data_processing.fetch --out_dir data --what eto        # dialogues only

    OUT_DIR/eto/alfworld_sft.json, sciworld_sft.json            3,118 and 1,482 dialogues
    OUT_DIR/eto/{train,dev,test}_indices.json                   ScienceWorld's games, for --pairs
    OUT_DIR/alfworld/json_2.1.1/...                             ALFWorld's

What is there and whole is kept, so the same command goes on where it was.  Without a network the message
says which files are to be brought here, and where to put them.
"""

from __future__ import annotations

import http.client
import json
import logging
import shutil
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from itp.config import flag, parse_settings
from itp.envs.alfworld.games import ALFWORLD_GAMES, is_whole, list_games
from itp.errors import UserError
from itp.files import check_output_folder, read_json, refusal, write_atomic, writing
from itp.games import SPLITS
from itp.program import run_main, say_next

log = logging.getLogger(__name__)
ETO = "agent-eto/eto-sft-trajectory"
REVISION = "main"
DIALOGUES = {"alfworld_sft.json": 3118, "sciworld_sft.json": 1482}
"""The files of ETO's data set and how many dialogues each holds, as its card says."""
LISTS = ("https://raw.githubusercontent.com/Yifan-Song793/ETO/9cd80875322d255db0c9e20600b22f88450ca0d6/"
         "eval_agent/data/sciworld")
"""Where ETO's repository has its lists of ScienceWorld's games, at a fixed commit."""
LIST_FILES = ("train_indices.json", "dev_indices.json", "test_indices.json")
WHAT = ("all", "eto", "lists", "games")


@dataclass
class FetchSettings:
    out_dir: str = flag("data", help="folder for the data; what is whole there is kept")
    what: str = flag("all", choices=WHAT,
                     help="ETO's dialogues, its lists of ScienceWorld's games, ALFWorld's games; or all")
    revision: str = flag(REVISION, help="revision of ETO's data set on the hub")


def fetch_dialogues(folder: Path, revision: str) -> None:
    """ETO's files, checked by their number of dialogues.  Raises UserError."""
    for name, count in DIALOGUES.items():
        path = folder / name
        if not path.is_file():
            there = _download(name, revision, path)
            beside = path.with_name(f".{name}.tmp")
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(there, beside)
                beside.replace(path)
        rows = read_json(path)
        if not isinstance(rows, list) or len(rows) != count:
            there = len(rows) if isinstance(rows, list) else type(rows).__name__
            raise UserError(f"{path}: {there} dialogues, not the {count} of the published set; delete it and try again")
        log.info("%s: %d dialogues", path, count)


def _download(name: str, revision: str, path: Path) -> str:
    """The file in the hub's cache, which resumes by itself."""
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    try:
        return huggingface_hub.hf_hub_download(ETO, f"data/{name}", repo_type="dataset", revision=revision)
    except (OSError, ValueError, HTTPError) as error:
        if why := refusal(error):
            raise UserError(f"{path}: can't be downloaded, because the hub's cache can't be written ({why}); set "
                            "HF_HOME to a folder that can") from error
        raise UserError(f"{path}: can't be downloaded ({type(error).__name__}); it needs the Hugging Face hub; or "
                        f"put data/{name} of the data set {ETO} there yourself") from error


def fetch_lists(folder: Path, url: str = LISTS) -> None:
    """ETO's lists of ScienceWorld's games, checked to be lists of (task, variation).  Raises UserError."""
    for name in LIST_FILES:
        path = folder / name
        if not path.is_file():
            write_atomic(path, _get(f"{url}/{name}", path))
        pairs = read_json(path)
        if not (isinstance(pairs, list) and pairs and all(
                isinstance(pair, list) and [type(part) for part in pair] == [str, int] for pair in pairs)):
            raise UserError(f"{path}: not a list of [task, variation]; delete it and try again")
        log.info("%s: %d games", path, len(pairs))


def _get(url: str, path: Path) -> str:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            text = answer.read().decode("utf-8")
        json.loads(text)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(f"{path}: can't be downloaded ({type(error).__name__}); put {url} there yourself") from error
    return text


def fetch_games(root: Path) -> None:
    """ALFWorld's games, checked by their number in each split.  Raises UserError."""
    if _lacking(root):
        tool = shutil.which("alfworld-download", path=str(Path(sys.executable).parent)) or \
            shutil.which("alfworld-download")
        if tool is None:
            raise UserError("alfworld-download isn't installed; pip install alfworld")
        with writing(root):
            root.mkdir(parents=True, exist_ok=True)
        # --force: where it was killed while unpacking, it would keep a file that is cut short.
        done = subprocess.run([tool, "--data-dir", str(root), "--force"], check=False)
        if done.returncode:
            raise UserError(f"{root}: alfworld-download ended with status {done.returncode}; it needs the network; "
                            "or put the folder json_2.1.1 of another machine there yourself")
        if lacking := _lacking(root):
            raise UserError(f"{root}: alfworld-download left {lacking}; try again with an alfworld of 0.4 or later")
    for split in SPLITS:
        log.info("%s: %d games of %s", root, len(list_games(split, root)), split)


def _lacking(root: Path) -> str:
    """What the folder lacks of the published games; empty: nothing."""
    lacking = []
    for split, published in ALFWORLD_GAMES.items():
        try:
            there = sum(map(is_whole, list_games(split, root)))  # a file may be cut short
        except UserError:  # none
            there = 0
        if there < published:
            lacking.append(f"{there} of {published} games of {split}")
    return ", ".join(lacking)


def main() -> None:
    settings = parse_settings(FetchSettings, prog="python -m world_model.data_processing.fetch", description=__doc__)
    out = Path(settings.out_dir)
    check_output_folder(out)
    if settings.what in ("all", "eto"):
        fetch_dialogues(out / "eto", settings.revision)
    if settings.what in ("all", "lists"):
        fetch_lists(out / "eto")
    if settings.what in ("all", "games"):
        fetch_games(out / "alfworld")
    print(f"data in {out}")
    say_next(f"python -m world_model.data_processing.convert --input {out / 'eto/alfworld_sft.json'} --env alfworld "
             "--put_to_move --out_dir DIR")


if __name__ == "__main__":
    run_main(main)
