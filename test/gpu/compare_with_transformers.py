"""Loads what export-for-transformers.ts wrote with Hugging Face transformers, and compares the logits.

usage: python3 compare_with_transformers.py DIRECTORY
prints one JSON line; exits 1 unless the mean difference is under 2% of the logits' standard deviation and 90% of the
argmaxes are equal
"""
import json, sys, numpy, torch, transformers

directory = sys.argv[1]
model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, device_map={"": 0})
tokens = torch.from_numpy(numpy.fromfile(f"{directory}/tokens.i32", dtype=numpy.int32).reshape(2, -1).astype(numpy.int64)).cuda()
ours = torch.from_numpy(numpy.fromfile(f"{directory}/logits.f32", dtype=numpy.float32)).cuda()
with torch.no_grad():
    theirs = model(tokens).logits.float().reshape(-1)
ours, theirs = ours.view(tokens.numel(), -1), theirs.view(tokens.numel(), -1)
difference = ((ours - theirs).abs().mean() / theirs.std()).item()
equal = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
passed = difference < 0.02 and equal >= 0.9
print(json.dumps(dict(transformers=transformers.__version__, model=type(model).__name__, parameters=model.num_parameters(), logits=list(ours.shape),
                      mean_difference_of_std=round(difference, 5), equal_argmax=round(equal, 4), passed=passed)))
sys.exit(0 if passed else 1)
