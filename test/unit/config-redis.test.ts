/** Connections to a Redis that is not there: they can be ended at any time, whoever waits for that. Without a server. */
import { once } from 'node:events';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect } from 'chai';
import { openRedis } from '../../config/redis.ts';
import type { Redis } from '../../config/redis.ts';
import { loadConfig } from '../../config/schema.ts';
import { until } from '../support/wait.ts';

const NOBODY = `unix://${join(tmpdir(), `nn-nobody-${process.pid}.sock`)}`;

describe('connections to Redis', () => {
  /** One that was refused, and is to be opened anew in 30 s. */
  const waiting = async (redis: Redis): Promise<Redis> => {
    redis.options.retryStrategy = () => 30_000;
    void redis.connect().catch(() => undefined);
    await until('the pause', () => redis.status === 'reconnecting');
    return redis;
  };
  const open = (): Redis => openRedis(NOBODY, loadConfig({}), 'blocking');

  for (const [what, make] of [['a connection', open], ['its duplicate', () => open().duplicate()]] as const) {
    it(`${what} that waits to be opened anew ends when it is told to, and what waits for an answer fails`, async () => {
      const redis = make().on('error', () => undefined);
      await waiting(redis);
      const answer = redis.ping().then(() => 'an answer', (error: Error) => error.message);
      const ended = once(redis, 'end');
      redis.disconnect();
      await ended;
      expect(await answer).to.equal('Connection is closed.');
      expect(redis.status).to.equal('end');
    });
  }
});
