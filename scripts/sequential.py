"""The yardstick of ``bench.py``: one request at a time, each a plain ``model.generate`` at batch 1.

Written from the documentation of Transformers; nothing of this project's engine, batching or caches is in it.  It
keeps the LM contract, so that the same planners ask it the same prompts with the same decoding.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria

from itp.agent.policy_with_heads import PolicyHeads
from itp.lm.base import GenParams, Generation, HeadOutputs, TokenLogprobs, asking
from itp.lm.tokenize import Encoder

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class StopStrings(StoppingCriteria):
    """Ends a row of batch 1 where one of ``stop`` appears in what it has generated."""

    def __init__(self, tokenizer, prompt_length: int, stop: Sequence[str]) -> None:
        self.tokenizer, self.prompt_length, self.stop = tokenizer, prompt_length, stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        text = self.tokenizer.decode(input_ids[0, self.prompt_length:], skip_special_tokens=True)
        return torch.tensor([any(s in text for s in self.stop)], device=input_ids.device)


class SequentialLM:
    """The LM contract, request after request.  ``heads``: what :meth:`read_heads` reads."""

    def __init__(self, path: str, *, role: str, device: str, dtype: str, heads: PolicyHeads | None = None) -> None:
        self.name, self.role, self.heads = path, role, heads
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=TORCH_DTYPES[dtype]).to(device).eval()
        self.encode = Encoder(self.tokenizer)
        self.context_length = None
        self.batches: list[int] = []
        self.busy_s = 0.0
        self.passes, self.tokens_read = 0, 0

    async def generate(self, prompts: Sequence[str], params: GenParams) -> list[Generation]:
        return self._each(prompts, lambda prompt: self._generate(prompt, params))

    async def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[TokenLogprobs]:
        return self._each(pairs, lambda pair: self._score(*pair))

    async def read_heads(self, prompts: Sequence[str]) -> list[HeadOutputs]:
        return self._each(prompts, self._read_heads)

    async def close(self) -> None:
        pass

    def _each(self, requests: Sequence, answer) -> list:
        start = time.monotonic()
        with asking(self.role) as answers, torch.no_grad():
            answers += [answer(request) for request in requests]
        self.busy_s += time.monotonic() - start
        self.batches += [1] * len(answers)
        return answers

    def _ids(self, text: str) -> torch.Tensor:
        return self.tokenizer(text, return_tensors="pt").input_ids.to(self.model.device)

    def _generate(self, prompt: str, params: GenParams) -> Generation:
        ids = self._ids(prompt)
        length, eos = ids.shape[1], self.tokenizer.eos_token_id
        options = {"max_new_tokens": params.max_new_tokens, "do_sample": params.temperature > 0}
        if params.temperature > 0:
            options |= {"temperature": params.temperature, "top_p": params.top_p, "top_k": 0}
        choices = {tuple(self.encode.continuation(c)): c for c in params.choices}
        if choices:
            def allowed(batch: int, so_far: torch.Tensor) -> list[int]:
                done = tuple(so_far[length:].tolist())
                return sorted({c[len(done)] for c in choices if c[:len(done)] == done and len(c) > len(done)}) or [eos]

            options |= {"prefix_allowed_tokens_fn": allowed, "max_new_tokens": max(map(len, choices)) + 1}
        if params.stop:
            options["stopping_criteria"] = [StopStrings(self.tokenizer, length, params.stop)]
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=eos, output_scores=True,
                                  output_logits=True, return_dict_in_generate=True, **options)
        written = out.sequences[0, length:].tolist()
        self.passes += len(written)
        self.tokens_read += sum(length + i for i in range(len(written)))
        # In scores what isn't allowed has probability 0, so that the choices' probabilities have the sum 1.
        given = out.scores if choices else out.logits
        logprob = sum(float(row[0].float().log_softmax(-1)[i]) for row, i in zip(given, written, strict=True))
        new = [i for i in written if i != eos]
        text = choices[tuple(new)] if choices else self.encode.decode(new)
        for stop in params.stop:
            text = text.partition(stop)[0]
        reason = "stop" if len(new) < params.max_new_tokens else "length"
        return Generation(text, length, len(new), 0, reason, logprob)

    def _score(self, context: str, completion: str) -> TokenLogprobs:
        ids = self._ids(context)
        targets = torch.tensor(self.encode.continuation(completion), device=ids.device)
        logits = self.model(torch.cat([ids, targets[None]], dim=1)).logits[0, ids.shape[1] - 1:-1]
        found = logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        return TokenLogprobs(tuple(found.tolist()), ids.shape[1] + len(targets))

    def _read_heads(self, prompt: str) -> HeadOutputs:
        ids = self._ids(prompt)
        hidden = self.model(ids, output_hidden_states=True).hidden_states[-1][:, -1]
        k_logits, values = self.heads(hidden)
        return HeadOutputs(tuple(k_logits[0].log_softmax(-1).tolist()), values[0].item(), ids.shape[1])
