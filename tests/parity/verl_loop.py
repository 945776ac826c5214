"""An agent loop for verl that says what the script has for the prompt, in place of a language model."""

from __future__ import annotations

from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput

SCRIPT: dict[str, list[tuple[str, int]]] = {
    "Was the film any good?": [("It was not bad, but the ending was weak.<|im_end|>", 1)],
    "Tell me about the plot and the ending. Was the film any good?": [
        ("Let me look that up.<|im_end|>", 1),
        ("\n<|im_start|>tool\nThe search found three reviews<|im_end|>\n<|im_start|>assistant\n", 0),
        ("All of them good; the actors were superb.<|im_end|>", 1),
    ],
    "Good?": [("Yes", 1)],
    "And the actors?": [("  Superb, all of them!\n<|im_end|>", 1)],
    "The end?": [("Weak, I was told.", 1), ("\n<|im_start|>tool\nand the tool has the last word", 0)],
    "Plot?": [("<|im_end|>", 1)],
}
"""Texts the policy's tokens are made of, 0 where they are a tool's."""


class ScriptedLoop(AgentLoopBase):
    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        messages = list(kwargs["raw_prompt"])

        def encode(text: str) -> list[int]:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]

        prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        parts = [(encode(text), mask) for text, mask in SCRIPT[messages[-1]["content"]]]
        return AgentLoopOutput(
            prompt_ids=encode(prompt),
            response_ids=[i for ids, _ in parts for i in ids],
            response_mask=[mask for ids, mask in parts for _ in ids],
            num_turns=2 * len(parts),
            metrics=AgentLoopMetrics(),
        )
