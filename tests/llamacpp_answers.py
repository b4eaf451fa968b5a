"""llama.cpp in a process of its own (its thread pool is not PyTorch's): what it answers, as JSON on standard output.

Standard input: {"model": path, "lora": path or null, "prompts": [[token ids]], "new_tokens": N, "top": N}. For each
prompt comes a list with, for each new token before the one that ends the answer, its id and the log-probabilities of
the most likely tokens, [[id, logprob], ...].
"""

import importlib
import json
import os
import sys
from typing import Any


def main() -> None:
    asked = json.load(sys.stdin)
    answers_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # llama.cpp prints where it likes
    xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = asked["model"]
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 1024, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(os.environ.get("OMP_NUM_THREADS", "2"))
    if asked["lora"]:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = asked["lora"], 1.0
        params.lora_adapters = [adapter]
    server = xllamacpp.Server(params)
    answers = []
    for prompt in asked["prompts"]:
        answer = server.handle_completions(
            {
                "prompt": prompt,
                "n_predict": asked["new_tokens"],
                "temperature": 0,
                "n_probs": asked["top"],
                "cache_prompt": True,  # of a beginning that the last prompt had too
            }
        )
        tokens = (answer["choices"][0]["logprobs"] or {"content": []})["content"]
        answers.append([[t["id"], [[top["id"], top["logprob"]] for top in t["top_logprobs"]]] for t in tokens])
    json.dump(answers, answers_to)
    answers_to.close()
    os._exit(0)  # its threads do not always end by themselves


if __name__ == "__main__":
    main()
