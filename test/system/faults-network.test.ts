/**
 * Redis that dies, is full, stands still or is changed under way, and a network that goes silent: everything waits and goes
 * on. Each run ends with the weights of the undisturbed one, and its history shows that each (step, shard) counted once.
 */
import { expect } from 'chai';
import { pino } from 'pino';
import { openRedis } from '../../config/redis.ts';
import type { RunSpecInput } from '../../config/run-spec.ts';
import { Policies } from '../../orchestrator/policies.ts';
import { Proxy } from '../support/proxy.ts';
import type { Silence } from '../support/proxy.ts';
import { PASSWORD } from '../support/redis.ts';
import type { RedisServer } from '../support/redis.ts';
import { Stack } from '../support/stack.ts';
import { until } from '../support/wait.ts';

const STEPS = 30;
/** A step of this takes some 50 ms, so that what happens to it happens under way. */
const SPEC: Partial<RunSpecInput> = { steps: STEPS, batch: { shards: 4, microBatches: 1, sequences: 8, sequenceLength: 64 }, checkpoint: { every: 10, keep: 2 } };
/** Milliseconds for which the network is silent: longer than the lock and the death of a worker, and than a dead connection is borne. */
const SILENT_MS = 2_200;
/** `NN_OUTAGE_MS=60000` is the outage of a minute; times are short here, so that a few seconds are several times all of them. */
const OUTAGE_MS = Number(process.env['NN_OUTAGE_MS'] ?? 4_000);

describe('faults: Redis and the network', function () {
  this.timeout(120_000 + 2 * OUTAGE_MS);
  let stack: Stack;
  let reference: string;

  before(async () => {
    stack = await Stack.start({ proxied: true });
    await stack.orchestrate();
    await stack.work(2);
    await stack.train('calm', { ...SPEC, parallelism: 1 });
    reference = (await stack.finish('calm')).weightsDigest!;
  });
  afterEach(() => stack.settle());
  after(() => stack?.stop());

  const pause = (milliseconds: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, milliseconds));
  /** Trains, breaks something when the run is on its way, and holds the run to its promise. */
  const disturbed = async (name: string, parallelism: number, fault: (name: string) => Promise<void>): Promise<void> => {
    await stack.train(name, { ...SPEC, parallelism });
    await stack.reached(name, 5);
    await fault(name);
    await stack.prove(name, reference, 60_000 + OUTAGE_MS);
  };
  const WAYS = [['local', 1], ['flow', 2]] as const;

  it('SIGKILL of both servers, and a restart (local)', () =>
    disturbed('servers', 1, async () => {
      await stack.redis.kill();
      await stack.redis.start();
    }));

  it(`an outage of ${OUTAGE_MS / 1000} s: nothing fails, everything goes on (flow)`, () =>
    disturbed('outage', 2, async () => {
      await stack.redis.kill();
      await pause(OUTAGE_MS);
      await stack.redis.start();
    }));

  for (const role of ['queues', 'exchange'] as const) {
    it(`SIGKILL of the server of the ${role} alone (flow)`, () =>
      disturbed(`server-${role}`, 2, async () => {
        await stack.redis[role].kill();
        await stack.redis[role].start();
      }));
  }

  it('a Redis that stands still for a while (flow)', () =>
    disturbed('still', 2, async () => {
      stack.redis.queues.pause();
      stack.redis.exchange.pause();
      await pause(SILENT_MS);
      stack.redis.queues.resume();
      stack.redis.exchange.resume();
    }));

  const silences: [who: 'workers' | 'orchestrators', parallelism: number, [Silence, 'heal' | 'cut'][]][] = [
    ['workers', 1, [['up', 'heal'], ['down', 'cut']]],
    ['workers', 2, [['down', 'heal'], ['both', 'cut']]],
    ['orchestrators', 1, [['both', 'heal'], ['up', 'cut']]],
    ['orchestrators', 2, [['up', 'heal'], ['down', 'heal']]],
  ];
  for (const [who, parallelism, ways] of silences) {
    it(`the network of the ${who} goes silent: ${ways.map(([way, end]) => `${way}, then ${end === 'cut' ? 'cut' : 'alive'}`).join('; ')} (parallelism ${parallelism})`, async () => {
      const name = `silent-${who}-${parallelism}`;
      const network = who === 'workers' ? stack.workersNetwork! : stack.orchestratorsNetwork!;
      const proxies = [network.queues, network.exchange];
      await stack.train(name, { ...SPEC, parallelism });
      for (const [way, end] of ways) {
        // Each comes when the run has gone on after the one before.
        await stack.reached(name, Math.min(STEPS, stack.counted(name) + 3));
        for (const proxy of proxies) proxy.silence(way);
        await pause(SILENT_MS);
        for (const proxy of proxies) proxy[end]();
      }
      await stack.prove(name, reference);
    });
  }

  it('connections that fell silent for ever are given up, and opened anew (flow)', () =>
    disturbed('stranded', 2, async () => {
      for (const network of [stack.workersNetwork!, stack.orchestratorsNetwork!]) {
        network.queues.strand();
        network.exchange.strand();
      }
      await Promise.resolve();
    }));

  for (const [way, parallelism] of WAYS) {
    it(`CLIENT KILL of every connection, of those that listen too (${way})`, () =>
      disturbed(`client-kill-${way}`, parallelism, async (name) => {
        for (let round = 0; round < 2; round++) {
          for (const server of [stack.redis.queues, stack.redis.exchange]) {
            for (const type of ['normal', 'pubsub']) await server.call('CLIENT', 'KILL', 'TYPE', type);
          }
          await stack.reached(name, Math.min(STEPS, stack.counted(name) + 4));
        }
      }));
  }

  const full = async (servers: readonly RedisServer[]): Promise<void> => {
    for (const server of servers) await server.call('CONFIG', 'SET', 'maxmemory', '1mb');
    await pause(SILENT_MS);
    for (const server of servers) await server.call('CONFIG', 'SET', 'maxmemory', '0');
  };
  it('a Redis out of memory for a while (flow)', () => disturbed('memory', 2, () => full([stack.redis.queues, stack.redis.exchange])));

  /** Does something while the queues' Redis may evict keys. */
  const evicting = async (work: () => Promise<void>): Promise<void> => {
    await stack.redis.queues.call('CONFIG', 'SET', 'maxmemory-policy', 'allkeys-lru');
    try {
      await work();
    } finally {
      await stack.redis.queues.call('CONFIG', 'SET', 'maxmemory-policy', 'noeviction');
    }
  };

  it('an eviction policy is still looked for after a look met a connection that could not be opened', async () => {
    const proxy = await Proxy.listen(stack.redis.queues.socket);
    const redis = openRedis(`redis://:${PASSWORD}@127.0.0.1:${proxy.port}`, stack.config, 'blocking');
    const policies = new Policies(new Map([['there', redis]]), pino({ level: 'silent' }));
    const heard: string[] = [];
    policies.listen((what, { code }) => heard.push(`${what}: ${code}`));
    try {
      await redis.ping();
      proxy.silence('both');
      redis.disconnect(true);
      await until('a connection that is being opened', () => redis.status === 'connect');
      void policies.look();
      proxy.cut();
      await redis.ping();
      await evicting(() => policies.look());
      expect(heard).to.deep.equal(['Redis: REDIS_POLICY']);
    } finally {
      redis.disconnect();
      await proxy.close();
    }
  });

  it('an eviction policy that is changed under way is noticed, and told in the record', async () => {
    // Looked for twice a second: the run takes several.
    const long: Partial<RunSpecInput> = { ...SPEC, steps: 80, parallelism: 2 };
    await stack.train('calm-policy', long);
    const { weightsDigest } = await stack.finish('calm-policy');
    const name = 'policy';
    await stack.train(name, long);
    await stack.reached(name, 5);
    const noticed = async (): Promise<boolean> => {
      const { faults, phase, step, epoch, way } = await stack.client.run(name).record();
      if (faults.some(({ error }) => error.code === 'REDIS_POLICY')) return true;
      if (phase === 'completed') throw new Error(`the run was over first: ${JSON.stringify({ step, epoch, way, faults })}`);
      return false;
    };
    await evicting(() => until('the fault', noticed, 60_000));
    await stack.prove(name, weightsDigest!);
  });
});
