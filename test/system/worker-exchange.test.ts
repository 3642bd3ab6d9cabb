/**
 * The conformance suite of the exchange (workers/exchange/contract.ts), run against each implementation with its real
 * counterpart: for `redis`, a Redis that is killed and started again where a test says so.
 */
import { expect } from 'chai';
import type { Exchange, TensorSink, TensorSource } from '../../workers/exchange/contract.ts';
import { RedisExchange } from '../../workers/exchange/redis.ts';
import { codeOf } from '../support/code-of.ts';
import { eventually } from '../support/wait.ts';
import { WorkerWorld } from '../support/worker-world.ts';

const DIGEST = '0123456789abcdef0123456789abcdef';
const OTHER = 'fedcba98765432100123456789abcdef';
/** Elements of a chunk in this suite. */
const CHUNK = 1024;

const values = (length: number, seed = 1): Float32Array => Float32Array.from({ length }, (_, index) => Math.fround(Math.sin(index * seed + 0.5)));
const source = (from: Float32Array, digest = DIGEST): TensorSource => ({
  length: from.length,
  digest,
  read: (offset, into) => into.set(from.subarray(offset, offset + into.length)),
});
const sink = (into: Float32Array, digest = DIGEST): TensorSink => ({ length: into.length, digest, write: (offset, from) => into.set(from, offset) });

describe('exchange: redis', () => {
  let world: WorkerWorld;
  let exchange: Exchange;
  let orders: (() => void) | null;

  before(async () => {
    world = await WorkerWorld.start({ exchange: { chunkBytes: CHUNK * 4, concurrency: 3, timeoutMs: 500, outageMs: 600 } });
    exchange = new RedisExchange({ url: world.config.redis.exchangeUrl, config: world.config, beat: () => orders?.() });
  });
  beforeEach(async () => {
    orders = null;
    await world.clear();
  });
  after(async () => {
    exchange.close();
    await world.stop();
  });

  for (const length of [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 10 * CHUNK + 7]) {
    it(`brings back the same bits of ${length} elements`, async () => {
      const sent = values(length);
      await exchange.upload('a', source(sent));
      const got = new Float32Array(length).fill(Number.NaN);
      await exchange.download('a', sink(got));
      expect(Buffer.from(got.buffer).equals(Buffer.from(sent.buffer))).to.equal(true);
      expect(await exchange.complete('a', length)).to.equal(true);
    });
  }

  it('keeps NaN, infinities and the sign of zero', async () => {
    const sent = Float32Array.from([Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY, -0, 0, 1e-45]);
    await exchange.upload('a', source(sent));
    const got = new Float32Array(6);
    await exchange.download('a', sink(got));
    expect(Buffer.from(got.buffer).equals(Buffer.from(sent.buffer))).to.equal(true);
  });

  it('takes tensors of growing and shrinking sizes with the same buffers', async () => {
    for (const length of [5, 3 * CHUNK + 1, 17, 5 * CHUNK]) {
      await exchange.upload(`s${length}`, source(values(length, length)));
      const got = new Float32Array(length);
      await exchange.download(`s${length}`, sink(got));
      expect(got).to.deep.equal(values(length, length));
    }
  });

  it('may upload the same bits twice', async () => {
    const sent = values(2 * CHUNK);
    await exchange.upload('a', source(sent));
    await exchange.upload('a', source(sent));
    const got = new Float32Array(sent.length);
    await exchange.download('a', sink(got));
    expect(got).to.deep.equal(sent);
  });

  it('gives texts, and null where there is none', async () => {
    await exchange.seal('a', 'one');
    expect(await exchange.texts(['a', 'b'])).to.deep.equal(['one', null]);
    expect(await exchange.texts([])).to.deep.equal([]);
  });

  it('says GRADIENT_LOST of a missing chunk, and is not complete', async () => {
    await exchange.upload('a', source(values(3 * CHUNK)));
    await world.exchange.del('a:1');
    expect(await exchange.complete('a', 3 * CHUNK)).to.equal(false);
    expect(await codeOf(exchange.download('a', sink(new Float32Array(3 * CHUNK))))).to.equal('GRADIENT_LOST');
  });

  it('says GRADIENT_LOST of every single damaged byte of a chunk, header or payload', async () => {
    await exchange.upload('a', source(values(8)));
    const good = (await world.exchange.getBuffer('a:0'))!;
    for (let at = 0; at < good.length; at++) {
      const bad = Buffer.from(good);
      bad[at]! ^= 0x10;
      await world.exchange.set('a:0', bad);
      expect(await codeOf(exchange.download('a', sink(new Float32Array(8)))), `byte ${at}`).to.equal('GRADIENT_LOST');
    }
    await world.exchange.set('a:0', good.subarray(0, good.length - 4));
    expect(await codeOf(exchange.download('a', sink(new Float32Array(8)))), 'a short chunk').to.equal('GRADIENT_LOST');
  });

  it('says GRADIENT_LOST of a chunk in another one’s place, and of undamaged chunks of other bits', async () => {
    await exchange.upload('a', source(values(2 * CHUNK)));
    await world.exchange.copy('a:0', 'a:1', 'REPLACE');
    expect(await codeOf(exchange.download('a', sink(new Float32Array(2 * CHUNK))))).to.equal('GRADIENT_LOST');
    await exchange.upload('b', source(values(CHUNK), OTHER));
    expect(await codeOf(exchange.download('b', sink(new Float32Array(CHUNK), DIGEST)))).to.equal('GRADIENT_LOST');
  });

  it('works on after a failure', async () => {
    await codeOf(exchange.download('nothing', sink(new Float32Array(9 * CHUNK))));
    await exchange.upload('a', source(values(9 * CHUNK)));
    const got = new Float32Array(9 * CHUNK);
    await exchange.download('a', sink(got));
    expect(got).to.deep.equal(values(9 * CHUNK));
  });

  it('removes tensors whole, and everything of a prefix but no more', async () => {
    for (const key of ['p:x:r1:a', 'p:x:r1:b', 'p:x:r2:a']) {
      await exchange.upload(key, source(values(2 * CHUNK)));
      await exchange.seal(key, 'sealed');
    }
    await exchange.remove(['p:x:r1:a', 'p:x:none'], 2 * CHUNK);
    expect((await world.exchange.keys('p:x:r1:*')).sort()).to.deep.equal(['p:x:r1:b', 'p:x:r1:b:0', 'p:x:r1:b:1']);
    expect(await exchange.removeAll('p:x:r1:')).to.equal(3);
    expect(await world.exchange.keys('p:x:r1:*')).to.deep.equal([]);
    expect((await world.exchange.keys('p:x:r2:*')).length).to.equal(3);
    expect(await exchange.removeAll('p:x:r?:')).to.equal(0);
  });

  it('gives a transfer up when the heartbeat throws', async () => {
    const length = 8 * CHUNK;
    let chunks = 0;
    orders = () => {
      if (++chunks > 3) throw new Error('told to stop');
    };
    expect(await codeOf(exchange.upload('a', source(values(length))))).to.equal('Error: told to stop');
    orders = null;
    expect(await exchange.complete('a', length)).to.equal(false);
  });

  it('says TIMEOUT when a connected Redis does not answer, and works on after it', async () => {
    await exchange.seal('a', 'before');
    await world.exchange.call('CLIENT', 'PAUSE', '1200', 'ALL');
    expect(await codeOf(exchange.texts(['a']))).to.equal('TIMEOUT');
    const texts = await eventually('an answer', () => exchange.texts(['a']).catch(() => undefined));
    expect(texts).to.deep.equal(['before']);
  });

  it('waits through an outage, and says REDIS_UNAVAILABLE of one that is too long', async () => {
    await world.killRedis();
    const waiting = exchange.upload('a', source(values(CHUNK)));
    await world.startRedis();
    await waiting;
    expect(await exchange.complete('a', CHUNK)).to.equal(true);
    await world.killRedis();
    expect(await codeOf(exchange.texts(['a']))).to.equal('REDIS_UNAVAILABLE');
    await world.startRedis();
    expect(await exchange.texts(['a'])).to.deep.equal([null]);
  });
});
