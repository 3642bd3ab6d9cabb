/** What the kernels refuse: impossible arguments, types that a library lacks, too little workspace. Each names the kernel. */
import { expect } from 'chai';
import { Device } from '../../cuda/device.ts';
import { errorCode } from '../../config/errors.ts';

function thrown(call: () => void): Error {
  try {
    call();
  } catch (error) {
    return error as Error;
  }
  throw new Error('nothing was refused');
}

describe('refusals of the CPU library', () => {
  let device: Device;
  before(() => {
    device = Device.open({ library: 'cpu', index: 0, threads: 2 });
  });
  after(() => device.close());

  it('computing in bfloat16 is DEVICE_UNSUPPORTED, with the kernel and the reason', () => {
    const [x, w, r] = [device.allocate('bf16', 64), device.allocate('bf16', 64), device.allocate('f32', 64)];
    const { kernels } = device;
    for (const [name, call] of Object.entries({
      nn_silu_forward: () => kernels.siluForward(x, x, 64, 'bf16'),
      nn_softmax_forward: () => kernels.softmaxForward(x, x, 8, 8, 'bf16'),
      nn_rmsnorm_forward: () => kernels.rmsnormForward(x, r, x, w, 8, 8, 1e-5, 'bf16'),
      nn_flash_attention_forward: () => kernels.flashAttentionForward(x, r, x, 1, 1, 1, 1, 8, 'bf16'),
      nn_cross_entropy_forward: () => kernels.crossEntropyForward(r, x, device.allocate('i32', 8), 8, 8, 'bf16'),
    })) {
      const error = thrown(call);
      expect(errorCode(error)).to.equal('DEVICE_UNSUPPORTED');
      expect(error.message).to.include(name).and.to.include('float32');
    }
  });

  it('an impossible size or scalar is a plain error that says what is required', () => {
    const [f, i] = [device.allocate('f32', 256), device.allocate('i32', 8)];
    const { kernels } = device;
    expect(thrown(() => kernels.softmaxTopkForward(f, f, i, f, 1, 4, 5)).message).to.include('K <= E');
    expect(thrown(() => kernels.flashAttentionForward(f, f, f, 1, 1, 3, 2, 4, 'f32')).message).to.include('Q % G == 0');
    expect(thrown(() => kernels.ropeForward(f, f, i, f, f, 1, 1, 4, 4, 2, 'f32')).message).to.include('direction');
    expect(thrown(() => kernels.sample(i, f, i, 1, 8, 0, 1, 'f32')).message).to.include('temperature > 0');
    expect(thrown(() => kernels.toppSample(i, f, i, 1, 8, 1.5, 1, 1, 'f32')).message).to.include('top_p');
    const [half, rest, control] = [device.allocate('bf16', 8), device.allocate('u16', 8), device.allocate('f64', 3)];
    expect(thrown(() => kernels.adamwStep(f, rest, f, f, f, control, control, 8, 0.9, 0.95, 1e-8, 0.1, 'f32', 'f32')).message).to.include('residue');
    expect(thrown(() => kernels.adamwStep(half, null, f, f, f, control, control, 8, 0.9, 0.95, 1e-8, 0.1, 'f32', 'bf16')).message).to.include('residue');
    expect(thrown(() => kernels.topkSample(i, f, i, 1, 8, 9, 1, 1, 'f32')).message).to.include('top_k');
  });

  it('a position outside the cache is refused before anything is written', () => {
    const [cache, qkv, start] = [device.allocate('f32', 4 * 8), device.allocate('f32', 2 * 24), device.allocate('i32', 1)];
    device.upload(start, Int32Array.from([3]));
    const error = thrown(() => device.kernels.cacheAppend(cache, cache, qkv, start, 1, 2, 4, 1, 1, 8, 'f32'));
    expect(error.message).to.include('nn_cache_append');
  });

  it('too little workspace names the bytes needed', () => {
    const f = device.allocate('f32', 64 * 64);
    device.setWorkspace(null);
    const error = thrown(() => device.kernels.rmsnormBackward(f, f, f, f, f, f, 64, 64, 'f32'));
    expect(error.message).to.match(/workspace/).and.to.match(/needs \d+ bytes/);
  });
});
