"""Serve the model that comes with kvtrace by continuous batching, from a pool that is too small.

    kvtrace record --detail events --out served.kvtrace -- examples/record_batching.py

Nine requests, three of which share the begin of their prompts; the pool of 40 blocks of 8 tokens
cannot hold all of them at once, so some wait and some are preempted.
"""

from transformers import ContinuousBatchingConfig, GenerationConfig

from kvtrace_recorder import demo

BEGINS = (0, 0, 0, 40, 80, 120, 160, 200, 240)
LENGTHS = (70, 60, 45, 30, 65, 20, 55, 40, 10)

model, tokenizer = demo.load()
text = tokenizer(demo.PROMPT)["input_ids"]
prompts = [text[begin : begin + length] for begin, length in zip(BEGINS, LENGTHS, strict=True)]
results = model.generate_batch(
    prompts,
    generation_config=GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=-1),
    continuous_batching_config=ContinuousBatchingConfig(
        page_size=8, num_blocks=40, max_batch_tokens=64
    ),
)
for name, result in sorted(results.items()):
    print(name, tokenizer.decode(result.generated_tokens)[:60].replace("\n", " "))
