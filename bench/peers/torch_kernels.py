"""Peer: the 6.9B model's largest kernels in bf16 PyTorch: cuBLAS products, cuDNN or flash attention, grouped_mm experts, compiled
elementwise parts, fused AdamW. Gathers and scatters are part of what is timed where they are part of ours.

usage: python3 torch_kernels.py [--batch B] [--seq S]
prints one JSON line for each kernel: name and shape as `bench kernels` names them, ms (median of 9)
"""
import argparse, json, torch, torch.nn.functional as F

HIDDEN, HEADS, HEAD, EXPERTS, TOPK, FFN, VOCAB = 768, 12, 64, 16, 4, 6144, 32000
bf16, dev = torch.bfloat16, "cuda"
grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm
ap = argparse.ArgumentParser()
ap.add_argument("--batch", type=int, default=4); ap.add_argument("--seq", type=int, default=4096)
a = ap.parse_args()
T = a.batch * a.seq
torch.manual_seed(0)
r = lambda *shape: torch.randn(*shape, device=dev, dtype=bf16)


def report(name, shape, f):
    try:
        for _ in range(3): f()
        times = []
        for _ in range(9):
            s, e = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            s.record(); f(); e.record(); torch.cuda.synchronize()
            times.append(s.elapsed_time(e))
        print(json.dumps(dict(name=name, shape=shape, ms=round(sorted(times)[4], 4))), flush=True)
    except Exception as error:  # a kernel that this torch lacks is left out; the others still count
        print(json.dumps(dict(name=name, shape=shape, error=str(error).splitlines()[0][:200])), flush=True)


def product(name, m, n, k):
    x, w = r(m, k), r(n, k)
    report(name, f"{m}x{n}x{k}", lambda: F.linear(x, w))


product("qkv", T, HIDDEN + 2 * HEAD, HIDDEN)
product("attention output", T, HIDDEN, HIDDEN)

q, k, v = (r(a.batch, HEADS, a.seq, HEAD).requires_grad_(), r(a.batch, 1, a.seq, HEAD).requires_grad_(), r(a.batch, 1, a.seq, HEAD).requires_grad_())
attend = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
with torch.no_grad(): report("flash_attention_forward", f"B={a.batch} S={a.seq}", attend)
o = attend(); do = torch.randn_like(o)
report("flash_attention_backward", f"B={a.batch} S={a.seq}", lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True))
del o, do

with torch.no_grad():
    x, gate_up, down = r(T, HIDDEN), r(EXPERTS, 2 * FFN, HIDDEN) * 0.02, r(EXPERTS, HIDDEN, FFN) * 0.02
    index = torch.stack([torch.randperm(EXPERTS, device=dev)[:TOPK] for _ in range(64)]).repeat((T + 63) // 64, 1)[:T].reshape(-1)
    order = index.argsort(stable=True); token = order // TOPK
    offs = torch.bincount(index, minlength=EXPERTS).cumsum(0).to(torch.int32)
    weight = torch.rand(T * TOPK, device=dev)
    swiglu = torch.compile(lambda g: F.silu(g[:, :FFN]) * g[:, FFN:])
    wt, dt = gate_up.transpose(1, 2), down.transpose(1, 2)
    report("moe_up_forward", f"T={T}", lambda: swiglu(grouped_mm(x[token], wt, offs=offs)))
    g = grouped_mm(x[token], wt, offs=offs); h = swiglu(g)
    report("moe_down_forward", f"T={T}", lambda: grouped_mm(h, dt, offs=offs))

    @torch.compile
    def dswiglu(dh, g, w):
        gate, up, dh = g[:, :FFN].float(), g[:, FFN:].float(), dh.float()
        s = torch.sigmoid(gate); h = gate * s * up; wd = dh * w[:, None]
        return torch.cat((wd * up * s * (1 + gate * (1 - s)), wd * gate * s), 1).to(bf16), (h * w[:, None]).to(bf16), (dh * h).sum(-1)

    report("moe_down_backward", f"T={T}", lambda: dswiglu(grouped_mm(x[token], down, offs=offs), g, weight))
    report("moe_up_backward", f"T={T}", lambda: grouped_mm(g, gate_up, offs=offs))
    # float32 accumulation over microbatches, as the peer that trains does it.
    acc1, acc2 = torch.zeros(EXPERTS, HIDDEN, FFN, device=dev), torch.zeros(EXPERTS, 2 * FFN, HIDDEN, device=dev)
    report("moe_down_weight_gradient", f"T={T}", lambda: acc1.add_(grouped_mm(x[token].t(), h, offs=offs)))
    report("moe_up_weight_gradient", f"T={T}", lambda: acc2.add_(grouped_mm(g.t(), x[token], offs=offs)))
    del g, h, acc1, acc2
    y = r(T * TOPK, HIDDEN); slot = order.argsort().view(T, TOPK); w4 = weight.view(T, TOPK)
    combine = torch.compile(lambda: x + (y[slot].float() * w4[..., None]).sum(1).to(bf16))
    report("moe_combine", f"T={T}", combine)
    norm = torch.ones(HIDDEN, device=dev, dtype=bf16); delta = r(T, HIDDEN)
    residual = torch.compile(lambda: (x + delta, F.rms_norm(x + delta, (HIDDEN,), norm, 1e-5)))
    report("rmsnorm_residual_forward", f"T={T}", residual)

n = EXPERTS * HIDDEN * FFN
p = torch.nn.Parameter(torch.randn(n, device=dev)); p.grad = torch.randn(n, device=dev)
opt = torch.optim.AdamW([p], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
report("adamw_step", f"n={n}", opt.step)
report("grad_norm", f"n={n}", lambda: torch.linalg.vector_norm(p.grad))
