"""From a model's reply to the action that is executed.

No function here corrects an action.  An action that the environment doesn't know is executed too, so that the
environment's answer ("Nothing happens.") is counted.

Models that this project trained write a bare command, or ``Thought: ...`` and ``Action: ...`` on lines of their own.
Chat models decorate both (``**Action:** `look` ``), write the command below its label, in tags, in a code block or in
a sentence ("I will look."), and go on with rounds that they imagine.  The action of a reply is that of its first round.
"""

from __future__ import annotations

import re

THINK, THOUGHT = "<think>", "</think>"
"""The marks that thinking models put around their thoughts, before the answer."""

# Every repetition below has a bound, because a model that repeats itself must not make a search take minutes.
_MARKS = "`'\"*_#>“”‘’"
_SPACE = "[ \\t]{1,4}"
_BEFORE = rf"(?:[^\w\n]|_){{0,12}}(?:\d{{1,3}}[.)]{_SPACE})?(?:[^\w\n]|_){{0,6}}"
"""Decoration, and the number of an item of a list, before a label."""
_BEHIND = rf"[ \t{_MARKS}]{{0,8}}(?:[:：=]|{_SPACE}[–—-](?=[ \t]))[ \t]{{0,4}}(?:[*_]{{1,4}}(?=\s|$))?"
_NUMBERED = r"(?:[ \t]{0,2}\#?\d{1,4})?"
_WORDS = (rf"(?:(?:my|the|your|next|final|best|chosen|selected|suggested){_SPACE}){{0,4}}(?:action|command)"
          rf"(?:{_SPACE}to{_SPACE}take)?{_NUMBERED}")
_ON_A_LINE = re.compile(rf"^{_BEFORE}{_WORDS}(?:{_BEHIND}|[ \t{_MARKS}]{{0,8}}$)", re.MULTILINE | re.IGNORECASE)
_IN_A_LINE = re.compile(rf"(?<=[.!?;:,)\]{_MARKS}]){_SPACE}[{_MARKS}]{{0,6}}Action{_NUMBERED}{_BEHIND}"
                        rf"|\b(?i:(?:my|the|next|final|best|chosen){_SPACE}(?:action|command))(?:{_SPACE}is)?{_BEHIND}")
_AFTER_A_WORD = re.compile(rf"[ \t][{_MARKS}]{{0,6}}Action{_NUMBERED}{_BEHIND}", re.IGNORECASE)
_THOUGHT = rf"\s{{0,8}}{_BEFORE}(?:thoughts?|think|thinking|reasoning){_NUMBERED}{_BEHIND}"
_THOUGHT_FIRST = re.compile(rf"(?:{_THOUGHT}){{1,4}}", re.IGNORECASE)
_ROUND = rf"(?:Observation|Thought|Human|User|Environment|Assistant|System|Task){_NUMBERED}"
_NEXT_ROUND = re.compile(rf"^{_BEFORE}(?i:{_ROUND}){_BEHIND}|[ \t][{_MARKS}]{{0,6}}{_ROUND}{_BEHIND}", re.MULTILINE)
"""What follows an action: the answer, or whoever speaks next."""
_TAGGED = re.compile(r"<(action|command)>(.*?)(?:</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"</?[a-z_]{1,30}>", re.IGNORECASE)
_SPECIAL = re.compile(r"<\|[^|<>\n]{1,40}\|>")
"""A special token of a chat template, written as text."""
_THOUGHTS = re.compile(r"<(thinking|thoughts?|reasoning|reflections?|plan|analysis|scratchpad)>.*?(?:</\1>|\Z)",
                       re.DOTALL | re.IGNORECASE)
_SPEAKER = re.compile(r"\A\s*(?:assistant|agent)[ \t]{0,4}:", re.IGNORECASE)
_FENCE = re.compile(r"^[ \t]{0,8}(?:```|~~~)[ \t]{0,4}\w{0,20}[ \t]{0,8}$\n?", re.MULTILINE)
_QUOTED = re.compile(r"`([^`\n]+)`|\"([^\"\n]+)\"|“([^“”\n]+)”")
_WRAPPED = re.compile(rf"{_QUOTED.pattern}|\*\*([^*\n]+)\*\*|<([^<>\n]+)>")
_JSON_ACTION = re.compile(r"([\"'])(?:next_?)?(?:action|command)\1\s{0,4}:\s{0,4}"
                          r"([\"'])([^\n]{1,200}?)\2\s{0,4}(?:[,}]|$)", re.MULTILINE | re.IGNORECASE)
_JSON_END = re.compile(r"\"\s*[},].*$", re.DOTALL)
_ITEM = re.compile(r"^(?:[>•#-]\s{0,4}|\d{1,3}[.)]\s{1,4})+(?=[a-zA-Z`'\"*])")
_SENTENCE_END = re.compile(r"[.!]\s+(?=[A-Z(])")
_VERB = re.compile(
    r"(?:go|teleport|look|open|close|take|pick up|put|move|use|heat|cool|clean|slice|examine|inventory|activate|"
    r"deactivate|turn on|turn off|toggle|connect|disconnect|read|eat|flush|wait\d*|pour|dunk|mix|focus on|drop|task|"
    r"help)\b(?!:)", re.IGNORECASE)
"""The beginnings of the environments' commands, by which a command is found in a sentence."""
_SAID = re.compile(
    r"(?:(?:ok|okay|sure|next|now|then|first|so|therefore|thus|well|alright|certainly)[,!.:]?\s+)*"
    r"(?:i\s*(?:['’]ll|['’]d|will|would|should|shall|must|need to|want to|have to|am going to|['’]m going to|"
    r"choose to)"
    r"(?:\s+(?:now|first|then|next|like to|try to))*|let me|let['’]s|let us|we should|we will|"
    r"(?:the|my) (?:(?:next|best) )*(?:action|command|step|move) (?:is|would be|should be)(?: to)?:?)\s+",
    re.IGNORECASE)
"""The beginning of a sentence that says what the speaker does next."""
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER = rf"(?<![\w.-])(\d+|{'|'.join(_NUMBERS)})(?!\w)"
_HELP = re.compile(rf"^{_BEFORE}help{_BEHIND}[{_MARKS}\s]{{0,8}}(?:yes|true)\b", re.MULTILINE | re.IGNORECASE)
"""The line that asks for more actions to be tried in imagination."""
_TRIED_LABELS = 20
"""Labels without an action behind them that are looked at: a model may repeat its label for ever."""


def parse_action(reply: str) -> str | None:
    """The action of a reply: behind its label (:func:`labeled_action`), or the reply itself without one.

    A reply of one line is its action, and so is a first line that answers the prompt's own label before the reply goes
    on with another round.  Of several lines without a label, the first that begins like a command is the action.  A
    reply that is a thought, or that has no such line, gives None.
    """
    text = _said(reply)
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and _is_command(lines[0]) and _is_label(lines[1]):
        return _command(lines[0])
    if (action := labeled_action(text)) or not lines:
        return action
    spoken = [line for line in lines if not _is_label(line)]
    if len(lines) == 1:
        return _command(lines[0]) or None if spoken else None
    return next((command for line in spoken if _VERB.match(command := _command(line))), None)


def labeled_action(reply: str, anywhere: bool = False) -> str | None:
    """The action behind a label (``Action:``), on the same line or on the next, or in a tag; None without one.

    A label begins a line or follows a sentence.  ``anywhere``: it may follow any word.
    """
    found = _labeled(_said(reply), anywhere)
    return found[0] if found else None


def clean_action(text: str) -> str:
    """An action without the quotes, the final full stop and the spaces that chat models add."""
    return " ".join(text.split()).strip("`'\"*. ")


def parse_thought(reply: str) -> str:
    """The text before the label of the action, without its own label."""
    text = _said(reply)
    found = _labeled(text)
    thought = text[:found[1]] if found else ""
    label = _THOUGHT_FIRST.match(thought)
    return thought[label.end() if label else 0:].strip()


def parse_help(reply: str) -> bool:
    """Whether a reply says ``Help: yes`` on a line of its own; False where it says nothing of it."""
    return bool(_HELP.search(without_thinking(reply)))


def parse_horizon(reply: str, max_k: int) -> int | None:
    """How many steps a reply names, at most ``max_k``; None where it has no whole number.

    It is the number behind ``Horizon:`` or before the word steps, else the first number, in digits or in words.
    """
    text = without_thinking(reply)
    for pattern in (rf"\b(?:horizon|answer|k)\b[\s{_MARKS}]{{0,8}}(?:[:=]|is)[\s{_MARKS}]{{0,8}}{_NUMBER}",
                    rf"{_NUMBER}[\s{_MARKS}]{{0,8}}(?:more |further )?steps?\b", _NUMBER):
        if match := re.search(pattern, text, re.IGNORECASE):
            said = match[1].lower()
            if said in _NUMBERS:
                return min(_NUMBERS.index(said), max_k)
            return min(int(said), max_k) if len(said) < 10 else max_k
    return None


def parse_line(reply: str, label: str) -> str:
    """The first line of a reply with a text, without ``label``."""
    lines = without_label(without_thinking(reply), label).splitlines()
    return next((line.strip() for line in lines if line.strip()), "")


def without_label(reply: str, label: str) -> str:
    """A reply without ``label`` at its beginning."""
    return re.sub(rf"\A{_BEFORE}{label}{_BEHIND}", "", reply.lstrip(), flags=re.IGNORECASE)


def without_thinking(reply: str) -> str:
    """A reply without the thoughts before it; empty where the thoughts have no end."""
    return "" if THINK in reply and THOUGHT not in reply else reply.rsplit(THOUGHT, 1)[-1]


def _said(reply: str) -> str:
    """A reply without thoughts in tags, the marks of code blocks, special tokens, and its speaker's name."""
    answer = _SPECIAL.sub("\n", _THOUGHTS.sub("", without_thinking(reply)))
    return _SPEAKER.sub("", _FENCE.sub("", answer))


def _labeled(text: str, anywhere: bool = False) -> tuple[str, int] | None:
    """The first round's action, and where its label begins."""
    if written := _JSON_ACTION.search(text):
        return clean_action(written[3]), written.start()
    if tag := _TAGGED.search(text):
        inside = _TAG.sub("", tag[2]).strip()
        found = _labeled(inside)
        action = found[0] if found else _command(inside.split("\n")[0])
        return (action, tag.start()) if action else None
    on_a_line, in_a_line = list(_ON_A_LINE.finditer(text)), list(_IN_A_LINE.finditer(text))
    if anywhere or _THOUGHT_FIRST.match(text):
        in_a_line = sorted([*in_a_line, *_AFTER_A_WORD.finditer(text)], key=lambda m: m.start())
    labels = [*on_a_line, *in_a_line]
    while labels:
        first = min(label.end() for label in labels)
        end = next((m.start() for m in _NEXT_ROUND.finditer(text, first)), len(text))
        here = [m for m in on_a_line if m.end() <= end] or [m for m in reversed(in_a_line) if m.end() <= end]
        for label in here[:_TRIED_LABELS]:
            if action := _behind(text[label.end():end]):
                return action, label.start()
        on_a_line, in_a_line = ([m for m in some if m.start() >= end] for some in (on_a_line, in_a_line))
        labels = [*on_a_line, *in_a_line]
    return None


def _behind(text: str) -> str:
    """The command behind a label: on its line, or on the next line with a text."""
    line = next((line for line in text.split("\n") if _bare(line)), "")
    return "" if _ON_A_LINE.match(line) else _command(line)


def _command(line: str) -> str:
    """The command that a line consists of, or that it marks, quotes or announces."""
    if (marked := _WRAPPED.match(line.strip())) and _VERB.match(inside := marked[marked.lastindex].strip()):
        return clean_action(inside)
    line = _bare(line)
    if not _VERB.match(line):
        quoted = next((text for found in _QUOTED.findall(line) for text in found if _VERB.match(text)), None)
        if quoted is not None:
            return clean_action(quoted)
    sentences = _SENTENCE_END.split(line)
    for sentence in sentences:
        if (said := _SAID.match(sentence)) and _VERB.match(rest := sentence[said.end():].lstrip(_MARKS)):
            inner = next((text for found in _QUOTED.findall(sentence) for text in found if _VERB.match(text)), None)
            return _stripped(inner or rest)
    return _stripped(sentences[0])


def _bare(line: str) -> str:
    """A line without tags and the decoration around it."""
    return _ITEM.sub("", _TAG.sub("", line).strip()).strip(" \t" + _MARKS)


def _stripped(text: str) -> str:
    text = clean_action(_JSON_END.sub("", text)).strip(_MARKS + "!. ")
    return text[1:-1].strip() if text[:1] + text[-1:] in ("[]", "()", "{}", "<>") else text


def _is_command(line: str) -> bool:
    """Whether a line is a command and nothing else."""
    return bool(_VERB.match(line.strip())) and not line.rstrip().endswith((".", ":", "!", "?"))


def _is_label(line: str) -> bool:
    """Whether a line begins with a label: of an action, a thought, an answer or a speaker."""
    return bool(_ON_A_LINE.match(line) or _THOUGHT_FIRST.match(line) or _NEXT_ROUND.match(line.lstrip()))
