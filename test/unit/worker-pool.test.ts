/**
 * A compute thread that dies or hangs is a DEVICE_FAULT, which only a new process cures; a writer thread that does fails its
 * checkpoint and no more. Nobody waits for either for ever.
 */
import { expect } from 'chai';
import { loadConfig } from '../../config/schema.ts';
import { ComputePool, WriterPool } from '../../workers/pool.ts';
import type { WriteTask } from '../../workers/tasks.ts';

const badThread = new URL('../support/worker-bad-thread.js', import.meta.url);

describe('compute pool', () => {
  const pools: ComputePool[] = [];
  const newPool = (): ComputePool => {
    const config = loadConfig({ worker: { callTimeoutMs: 1000 } });
    const pool = new ComputePool({ config, device: { library: 'cpu', index: 0, threads: 1 }, worker: 'w', queuesUrl: 'redis://127.0.0.1:1', exchangeUrl: 'redis://127.0.0.1:1' }, badThread);
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

describe('writer pool', () => {
  const task = (directory: string): WriteTask => ({ directory }) as WriteTask;

  it('names the checkpoint whose thread died or hung, and writes the next one', async () => {
    const pool = new WriterPool(1_000, new URL('../support/worker-bad-writer.js', import.meta.url));
    const died = await pool.write(task('/c/die'));
    expect(died).to.deep.include({ ok: false });
    if (!died.ok) expect(died.error).to.deep.include({ code: 'WORKER_LOST', context: { path: '/c/die' } });
    const hung = await pool.write(task('/c/hang'));
    if (!hung.ok) expect(hung.error).to.deep.include({ code: 'TIMEOUT', context: { path: '/c/hang' } });
    expect(hung.ok).to.equal(false);
    expect(await pool.write(task('/c/write'))).to.deep.equal({ ok: true, bytes: 7 });
    await pool.close();
  });
});
