"""Record a generation of the model that comes with kvtrace: python examples/record_generate.py."""

from kvtrace_recorder import demo, record

model, tokenizer = demo.load()
inputs = tokenizer("A list is a sequence of objects. The list", return_tensors="pt")
with record(model, "traces/example.kvtrace", force=True):
    output = model.generate(**inputs, max_new_tokens=40)
print(tokenizer.decode(output[0]))
