"""The flags of the evaluation programs: what all share, and each environment's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from itp.agent_settings import AgentSettings
from itp.config import flag
from itp.envs.base import TextEnv
from itp.envs.panel import Panel, alfworld_games, read_panel_of, scienceworld_games
from itp.envs.registry import EnvFlags, engine_of, games_of, scienceworld_engine
from itp.envs.scienceworld.games import ScienceworldFlags, list_games
from itp.games import Game


@dataclass
class EvalSettings(AgentSettings):
    """What is played, and where results go."""

    out_dir: str = flag(help="result folder; the same command again plays only what is missing there",
                        affects_result=False, aliases=("output_path",))
    override: bool = flag(False, help="delete the results in out_dir and start anew", affects_result=False)
    debug: bool = flag(False, help="play the first 5 games only", affects_result=False)
    part_num: int = flag(1, at_least=1, help="share the games out over this many runs", affects_result=False)
    part_idx: int = flag(-1, help="which share this run plays, from 0 (-1: all)", affects_result=False)
    max_games: int = flag(0, at_least=0, help="play so many games only, at equal distances over the split (0: all)",
                          affects_result=False)
    trials: int = flag(1, at_least=1, help="play each game up to so many times in order, until it is solved",
                       affects_result=False)
    trials_after_success: bool = flag(False, help="go on with a game's trials after it was solved",
                                      affects_result=False)
    only_ids: str = flag("", help="play these games only: indices such as 0,5,7", affects_result=False)
    panel: str = flag("", help="play exactly the games of this panel, in its order: a name in panels/, or a file "
                               "(python -m itp.envs.panel)", affects_result=False)
    env_processes: int = flag(2, at_least=1, help="processes that run the environments", affects_result=False)
    env: ClassVar[str]

    def read_panel(self) -> Panel | None:
        """What ``panel`` names.  Raises UserError where ``split`` contradicts it."""
        return read_panel_of(self.panel, self.env, self.split, default="dev") if self.panel else None


@dataclass
class AlfworldSettings(EvalSettings):
    """The games of ALFWorld, and the devices."""

    FIRST_FLAGS: ClassVar[tuple[str, ...]] = (
        "policy_model", "wm_model", "method", "env_data_root", "split",
        "out_dir", "max_k", "fixed_k", "action_selection", "max_games")
    split: str = flag("dev", help="dev = seen = valid_seen; test = unseen = valid_unseen; train", selects_games=True)
    env_data_root: str = flag("eval_agent/data/alfworld", help="folder that holds json_2.1.1")
    max_steps: int = flag(40, at_least=1, help="steps of an episode at most", selects_games=True)
    policy_device: str = flag("", help="device of the policy", affects_result=False)
    wm_device: str = flag("", help="device of the world model", affects_result=False)
    max_k: int = flag(-1, help="K_max: steps to imagine at most; -1: what the K-head was trained with, without one 2")
    env: ClassVar[str] = "alfworld"

    def games(self, panel: Panel | None = None) -> list[Game]:
        """The games of ``panel``, or of the split."""
        return alfworld_games(panel, self.env_data_root) if panel else games_of(
            EnvFlags(), self.split, self.env_data_root)

    def make_env(self, want_admissible: bool) -> Callable[[], TextEnv]:
        return engine_of(EnvFlags(), want_admissible=want_admissible)


@dataclass
class SciworldSettings(EvalSettings, ScienceworldFlags):
    """The games of ScienceWorld, and the devices."""

    FIRST_FLAGS: ClassVar[tuple[str, ...]] = (
        "policy_model", "wm_model", "method", "split", "tasks",
        "variations", "out_dir", "max_k", "action_selection", "max_games")
    split: str = flag("dev", help="dev = seen, test = unseen: the simulator's development and test variations; train",
                      selects_games=True)
    policy_device: str = flag("cuda:0", help="device of the policy", affects_result=False)
    wm_device: str = flag("cuda:1", help="device of the world model", affects_result=False)
    max_k: int = flag(-1, help="K_max: steps to imagine at most; -1: what the K-head was trained with, without one 3")
    min_k: int = flag(0, help="steps to imagine at least (not with --fixed_k)")
    concurrency: int = flag(4, help="episodes at a time; each has a JVM of some 250 MB, and two more "
                                    "load the next games; --wm_backend engine starts as many more at most",
                            affects_result=False)
    env: ClassVar[str] = "scienceworld"
    max_steps: ClassVar[int] = 0  # each game has its own

    def games(self, panel: Panel | None = None) -> list[Game]:
        """The games of ``panel``, or those that the flags select."""
        return scienceworld_games(panel, self) if panel else list_games(self.split, self)

    def make_env(self, want_admissible: bool) -> Callable[[], TextEnv]:
        return scienceworld_engine(self, want_admissible=want_admissible)
