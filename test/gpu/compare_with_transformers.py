"""Loads what export-for-transformers.ts wrote with Hugging Face transformers, and compares the logits.

usage: python3 compare_with_transformers.py DIRECTORY

Both sides compute from the same bf16 weights in float32 and in bf16. In float32 they must agree: the mean difference under 2% of the
logits' standard deviation and 90% of the argmaxes equal. In bf16 random routers are near ties, so that rounding sends tokens to other
experts on either side; what is printed there is how far each side is from transformers' float32.
prints one JSON line; exits 1 when the float32 logits disagree
"""
import json, sys, numpy, torch, transformers

directory = sys.argv[1]
tokens = torch.from_numpy(numpy.fromfile(f"{directory}/tokens.i32", dtype=numpy.int32).reshape(2, -1).astype(numpy.int64)).cuda()
ours = {name: torch.from_numpy(numpy.fromfile(f"{directory}/logits-{name}.f32", dtype=numpy.float32)).cuda().view(tokens.numel(), -1) for name in ("fp32", "bf16")}
theirs = {}
for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, device_map={"": 0})
    with torch.no_grad():
        theirs[name] = model(tokens).logits.float().view(tokens.numel(), -1)
    kind, parameters = type(model).__name__, model.num_parameters()
    del model
    torch.cuda.empty_cache()


def compare(a, b):
    return round(((a - b).abs().mean() / theirs["fp32"].std()).item(), 6), round((a.argmax(-1) == b.argmax(-1)).float().mean().item(), 4)


exact = compare(ours["fp32"], theirs["fp32"])
passed = exact[0] < 0.02 and exact[1] >= 0.9
print(json.dumps(dict(transformers=transformers.__version__, model=kind, parameters=parameters, logits=list(ours["fp32"].shape), passed=passed,
                      columns=["mean difference of the standard deviation", "equal argmax"], fp32_ours_theirs=exact, bf16_ours_theirs=compare(ours["bf16"], theirs["bf16"]),
                      bf16_ours_from_fp32=compare(ours["bf16"], theirs["fp32"]), bf16_theirs_from_fp32=compare(theirs["bf16"], theirs["fp32"]))))
sys.exit(0 if passed else 1)
