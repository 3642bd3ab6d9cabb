/** A compute thread that dies or hangs is a DEVICE_FAULT, which only a new process cures; nobody waits for it for ever. */
import { expect } from 'chai';
import { loadConfig } from '../../config/schema.ts';
import { ComputePool } from '../../workers/pool.ts';

const badThread = new URL('../support/worker-bad-thread.js', import.meta.url);

describe('compute pool', () => {
  const pools: ComputePool[] = [];
  const newPool = (): ComputePool => {
    const config = loadConfig({ worker: { callTimeoutMs: 1000 } });
    const pool = new ComputePool({ config, device: { library: 'cpu', index: 0, threads: 1 }, worker: 'w', exchangeUrl: 'redis://127.0.0.1:1' }, badThread);
    pools.push(pool);
    return pool;
  };
  after(() => Promise.all(pools.map((pool) => pool.destroy())));

  it('says DEVICE_FAULT when the thread dies', async () => {
    const outcome = await newPool().run({ kind: 'open' });
    expect(outcome.ok).to.equal(false);
    if (!outcome.ok) expect(outcome.error).to.include({ code: 'DEVICE_FAULT' });
  });

  it('says DEVICE_FAULT when the thread gives no sign of life', async () => {
    const outcome = await newPool().run({ kind: 'forget', run: 'x' });
    expect(outcome.ok).to.equal(false);
    if (!outcome.ok) expect(outcome.error).to.deep.include({ code: 'DEVICE_FAULT', context: { hung: true } });
  });

  it('closes by a task', async () => {
    await newPool().close();
  });
});
