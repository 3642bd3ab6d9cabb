/**
 * The two ends of the store against each other: what is asked for by run, role and digest arrives whole, goes on where it broke
 * off, and nothing else can be named; and the cache that keeps it on a worker's machine. Real HTTP through a proxy that breaks
 * connections or speaks TLS; no Redis and no native code.
 */
import { expect } from 'chai';
import { execFileSync } from 'node:child_process';
import { createHash, randomBytes } from 'node:crypto';
import { appendFileSync, existsSync, mkdirSync, mkdtempSync, readFileSync, readdirSync, rmSync, utimesSync, writeFileSync } from 'node:fs';
import { createServer, connect } from 'node:net';
import type { Server, Socket } from 'node:net';
import { globalAgent } from 'node:https';
import { hostname, tmpdir } from 'node:os';
import { join } from 'node:path';
import { createServer as createTlsServer } from 'node:tls';
import { parseRunSpec } from '../../config/run-spec.ts';
import { loadConfig } from '../../config/schema.ts';
import type { Config } from '../../config/schema.ts';
import { verifyCheckpoint, writeCheckpoint } from '../../data/checkpoint-files.ts';
import { readManifest } from '../../data/manifest.ts';
import type { Manifest } from '../../data/manifest.ts';
import type { Client } from '../../orchestrator/client.ts';
import { startServer } from '../../orchestrator/server/server.ts';
import type { Server as ApiServer } from '../../orchestrator/server/server.ts';
import { Cache } from '../../workers/cache.ts';
import { StoreClient, storeAddress } from '../../workers/store-client.ts';
import { makeCertificates, whyNoCertificates } from '../support/certificates.ts';
import { codeOf } from '../support/code-of.ts';

const TOKEN = 'a token of the store, long';

/** A TCP proxy whose next connections break after so many bytes of the answer, or of the request. */
class Breaker {
  readonly #server: Server;
  readonly #sockets = new Set<Socket>();
  readonly answers: number[] = [];
  readonly requests: number[] = [];
  carried = 0;

  constructor(port: number) {
    this.#server = createServer((socket) => {
      const other = connect(port, '127.0.0.1');
      const [mostAnswer, mostRequest] = [this.answers.shift() ?? Infinity, this.requests.shift() ?? Infinity];
      let [answered, asked] = [0, 0];
      const end = (): void => {
        socket.destroy();
        other.destroy();
      };
      for (const each of [socket, other]) {
        this.#sockets.add(each);
        each.on('error', end);
        each.on('close', end);
      }
      socket.on('data', (part) => {
        other.write(part.subarray(0, Math.max(0, mostRequest - asked)));
        if ((asked += part.length) >= mostRequest) other.end(end);
      });
      other.on('data', (part) => {
        this.carried += part.length;
        socket.write(part);
        if ((answered += part.length) >= mostAnswer) socket.end(end);
      });
    });
  }

  listen(): Promise<number> {
    return new Promise((resolve) => this.#server.listen(0, '127.0.0.1', () => resolve((this.#server.address() as { port: number }).port)));
  }

  /** Connections that are open are kept by HTTP's agent: the next request needs a new one to be broken. */
  drop(): void {
    for (const socket of this.#sockets) socket.destroy();
  }

  close(): void {
    this.drop();
    this.#server.close();
  }
}

describe('the store', function () {
  let directory: string;
  let config: Config;
  let server: ApiServer;
  let proxy: Breaker;
  let store: StoreClient;
  let record = { epoch: 3, phase: 'running' };
  const said: string[] = [];
  const contents = randomBytes(3_000_000);
  const sha256 = createHash('sha256').update(contents).digest('hex');

  before(async () => {
    directory = mkdtempSync(join(tmpdir(), 'nn-store-'));
    writeFileSync(join(directory, 'train.tokens'), contents);
    writeFileSync(join(directory, 'secret'), 'not of any run');
    const spec = parseRunSpec({ name: 'one', model: 'tiny', data: { train: join(directory, 'train.tokens') }, steps: 4, batch: { sequences: 1, sequenceLength: 8 } });
    const client = { run: () => ({ spec: () => Promise.resolve(spec), record: () => Promise.resolve(record) }) } as unknown as Client;
    config = loadConfig({ home: join(directory, 'home'), runs: join(directory, 'runs'), server: { port: 0 }, store: { token: TOKEN, timeoutMs: 500, outageMs: 3_000, pieceBytes: 1 << 20 } });
    server = await startServer({ config, client });
    proxy = new Breaker(Number(new URL(server.url).port));
    store = clientOf(`http://127.0.0.1:${await proxy.listen()}`);
  });
  after(async () => {
    proxy?.close();
    await server?.stop();
    rmSync(directory, { recursive: true, force: true });
  });

  const clientOf = (url: string, token = TOKEN): StoreClient => new StoreClient({ ...config, store: { ...config.store, url, token } }, (message) => said.push(message));
  const ask = async (path: string, init: RequestInit = {}): Promise<{ status: number; code: string | undefined }> => {
    const answer = await fetch(`${server.url}${path}`, { ...init, headers: { authorization: `Bearer ${TOKEN}`, ...(init.headers as Record<string, string>) } });
    const text = await answer.text();
    return { status: answer.status, code: text.startsWith('{') ? (JSON.parse(text) as { error?: { code?: string } }).error?.code : undefined };
  };
  const made = async (name: string, step: number, fill: number): Promise<{ path: string; manifest: Manifest }> => {
    const path = join(directory, name);
    const spec = parseRunSpec({ name: 'x', model: 'tiny', data: { train: 'x' }, steps: 1, batch: { sequences: 1, sequenceLength: 8 } });
    await writeCheckpoint(path, { model: spec.model, step, precision: 'fp32', tokenizer: null, read: (kind, _name, into) => void into.fill(kind === 'weight' ? fill : 0), runInfo: {} });
    return { path, manifest: readManifest(path)! };
  };

  it('gives nothing to a wrong token, and says so; a store that is not there is told from it', async () => {
    expect(await codeOf(clientOf(server.url, 'wrong').check())).to.equal('STORE_AUTH');
    expect((await fetch(`${server.url}/store/runs/one/train`)).status).to.equal(401);
    expect(await codeOf(clientOf('http://127.0.0.1:9').check())).to.equal('STORE_UNAVAILABLE');
    expect(await codeOf(store.check())).to.equal(undefined);
    expect(() => storeAddress('http://user:secret-in-url@host')).to.throw('CUDA_NN_STORE_URL').with.property('message').that.does.not.include('secret-in-url');
  });

  it('knows only files of runs: no request can name another', async () => {
    const listing = await store.listing('one', 'train');
    expect(listing.files).to.deep.equal({ contents: { bytes: contents.length, sha256 } });
    const secret = createHash('sha256').update('not of any run').digest('hex');
    for (const path of [
      '/store/runs/one/..%2f..%2fsecret', '/store/runs/one/secret', '/store/runs/one/validation', '/store/runs/one/step-07', '/store/runs/one/step-9', '/store/runs/..%2f..%2fx/step-1',
      `/store/runs/one/train/${secret}`, '/store/runs/one/train/..%2f..%2fsecret', `/store/runs/one/train/${sha256.slice(1)}`,
    ]) {
      const { status } = await ask(path);
      expect(status, path).to.be.within(400, 422);
    }
    const manifest = (name: string): RequestInit => ({
      method: 'PUT', headers: { 'content-type': 'application/json' },
      body: JSON.stringify({ epoch: 3, manifest: { version: 1, files: { [name]: { bytes: 3, sha256 } } } }),
    });
    for (const name of ['../../escape.json', '/etc/passwd', 'training/../../x.safetensors', 'training/x.sh', 'a/b.safetensors', '.hidden.safetensors']) {
      expect(await ask('/store/runs/one/step-1/upload', manifest(name)), name).to.deep.equal({ status: 400, code: 'MESSAGE_INVALID' });
    }
    expect((await ask('/store/runs/one/train/upload', manifest('config.json'))).code).to.equal('MESSAGE_INVALID');
    expect(existsSync(join(config.runs, 'one', 'checkpoints'))).to.equal(false);
  });

  it('a download that breaks twice goes on where it stood: no byte is fetched twice', async () => {
    proxy.drop();
    proxy.answers.push(Infinity, 1_000_000, 900_000);
    await store.listing('one', 'train');
    proxy.drop();
    const before = proxy.carried;
    const path = join(directory, 'fetched');
    const fetched = await store.download('one', 'train', { bytes: contents.length, sha256 }, path);
    expect(readFileSync(path).equals(contents)).to.equal(true);
    expect(fetched).to.equal(contents.length);
    expect(proxy.carried - before).to.be.below(contents.length + 400_000);
    expect(said.filter((line) => line.includes('broke off'))).to.have.length(2);
  });

  it('what arrived damaged is noticed and fetched again', async () => {
    const path = join(directory, 'damaged');
    writeFileSync(path, Buffer.concat([Buffer.from('wrong'), contents.subarray(5, 1000)]));
    await store.download('one', 'train', { bytes: contents.length, sha256 }, path);
    expect(readFileSync(path).equals(contents)).to.equal(true);
    expect(said.join('\n')).to.include('arrived damaged');
  });

  it('an outage is waited for up to its bound, and an abort ends it at once', async () => {
    const gone = clientOf('http://127.0.0.1:9');
    const controller = new AbortController();
    const waiting = codeOf(gone.listing('one', 'train', controller.signal));
    controller.abort();
    expect(await waiting).to.equal('CANCELLED');
    expect(await codeOf(gone.listing('one', 'train'))).to.equal('STORE_UNAVAILABLE');
  });

  it('a delivery that breaks goes on where it stood; the checkpoint is complete or absent', async () => {
    const { path, manifest } = await made('made-4', 4, 0.5);
    const target = join(config.runs, 'one', 'checkpoints', 'step-4');
    const size = [...new Map(Object.values(manifest.files).map(({ sha256: digest, bytes }) => [digest, bytes])).values()].reduce((sum, bytes) => sum + bytes, 0);
    proxy.drop();
    proxy.requests.push(Infinity, 700_000, 600_000, 800_000);
    const { sentBytes } = await store.deliver('one', 'step-4', 3, path, manifest);
    expect((await verifyCheckpoint(target)).step).to.equal(4);
    expect(readFileSync(join(target, 'manifest.json')).equals(readFileSync(join(path, 'manifest.json')))).to.equal(true);
    expect(readdirSync(join(config.runs, 'one', 'checkpoints'))).to.deep.equal(['step-4']);
    expect(sentBytes).to.be.at.most(size);
    expect((await store.deliver('one', 'step-4', 3, path, manifest)).sentBytes, 'what is there already').to.equal(0);
    expect((await verifyCheckpoint(target)).step).to.equal(4);
  });

  it('carries on what another sender or another server began, and replaces what was damaged meanwhile', async () => {
    const { path, manifest } = await made('made-8', 8, 0.25);
    const checkpoints = join(config.runs, 'one', 'checkpoints');
    const { upload } = (await (await fetch(`${server.url}/store/runs/one/step-8/upload`, {
      method: 'PUT', headers: { 'content-type': 'application/json', authorization: `Bearer ${TOKEN}` }, body: JSON.stringify({ epoch: 3, manifest }),
    })).json()) as { upload: string };
    const weights = readFileSync(join(path, 'model.safetensors'));
    const begun = join(checkpoints, `.step-8.${upload}.upload`, manifest.files['model.safetensors']!.sha256);
    writeFileSync(begun, weights.subarray(0, 500_000));
    appendFileSync(begun, 'damage');
    await store.deliver('one', 'step-8', 3, path, manifest);
    expect((await verifyCheckpoint(join(checkpoints, 'step-8'))).step).to.equal(8);
    expect(said.join('\n')).to.include('goes on from byte 500006');
    writeFileSync(join(checkpoints, 'step-8', 'model.safetensors'), Buffer.concat([weights.subarray(0, -1), Buffer.from([weights.at(-1)! ^ 1])]));
    await store.deliver('one', 'step-8', 3, path, manifest);
    expect((await verifyCheckpoint(join(checkpoints, 'step-8'))).step).to.equal(8);
  });

  it('a disk that is full there is told as such, leaves no checkpoint, and takes the rest once there is room', async function () {
    const { path, manifest } = await made('made-5', 5, 0.75);
    const checkpoints = join(config.runs, 'full', 'checkpoints');
    mkdirSync(checkpoints, { recursive: true });
    try {
      execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', checkpoints], { stdio: 'pipe' });
    } catch (error) {
      console.error(`      skipped: a small tmpfs cannot be mounted here (${(error as Error).message.split('\n').at(-1)}); run as root to test a full disk`);
      this.skip();
    }
    try {
      const error = await store.deliver('full', 'step-5', 3, path, manifest).then(() => null, (thrown: unknown) => thrown as Error & { code: string });
      expect(error?.code).to.equal('DISK_FULL');
      expect(error?.message).to.include(checkpoints);
      expect(existsSync(join(checkpoints, 'step-5'))).to.equal(false);
      execFileSync('mount', ['-o', 'remount,size=16m', checkpoints], { stdio: 'pipe' });
      const { sentBytes } = await store.deliver('full', 'step-5', 3, path, manifest);
      expect((await verifyCheckpoint(join(checkpoints, 'step-5'))).step).to.equal(5);
      expect(sentBytes, 'what was there already is not sent again').to.be.below(Object.values(manifest.files).reduce((sum, { bytes }) => sum + bytes, 0));
    } finally {
      execFileSync('umount', [checkpoints]);
    }
  });

  it('deliveries that nobody carries on do not keep others out', async () => {
    const { path, manifest } = await made('made-9', 9, 0.3);
    const begin = (step: number): Promise<Response> =>
      fetch(`${server.url}/store/runs/one/step-${step}/upload`, {
        method: 'PUT', headers: { 'content-type': 'application/json', authorization: `Bearer ${TOKEN}` }, body: JSON.stringify({ epoch: 3, manifest }),
      });
    for (let step = 100; step < 170; step++) expect((await begin(step)).status).to.equal(200);
    await store.deliver('one', 'step-9', 3, path, manifest);
    expect((await verifyCheckpoint(join(config.runs, 'one', 'checkpoints', 'step-9'))).step).to.equal(9);
  });

  it('takes no checkpoint of a job that was given up, nor of a run that is over, nor of another step', async () => {
    const { path, manifest } = await made('made-3', 3, 0.1);
    expect(await codeOf(store.deliver('one', 'step-3', 2, path, manifest))).to.equal('CANCELLED');
    record = { epoch: 3, phase: 'cancelled' };
    expect(await codeOf(store.deliver('one', 'step-3', 3, path, manifest))).to.equal('CANCELLED');
    record = { epoch: 3, phase: 'running' };
    expect(await codeOf(store.deliver('one', 'step-2', 3, path, manifest))).to.equal('CHECKPOINT_INVALID');
    expect(existsSync(join(config.runs, 'one', 'checkpoints', 'step-2'))).to.equal(false);
  });

  it('speaks TLS behind a proxy, and says at once why it does not trust one', async function () {
    const reason = whyNoCertificates();
    if (reason !== null) {
      console.error(`      skipped: ${reason}`);
      this.skip();
    }
    const { caFile, otherCaFile, server: own } = makeCertificates(directory, ['IP:127.0.0.1']);
    const target = Number(new URL(server.url).port);
    const secure = createTlsServer({ cert: readFileSync(own.certificateFile), key: readFileSync(own.keyFile) }, (socket) => {
      const plain = connect(target, '127.0.0.1');
      for (const [from, to] of [[socket, plain], [plain, socket]] as const) from.on('error', () => to.destroy()).pipe(to);
    });
    const port = await new Promise<number>((resolve) => secure.listen(0, '127.0.0.1', () => resolve((secure.address() as { port: number }).port)));
    // What NODE_EXTRA_CA_CERTS does, which a process reads when it starts.
    const trusting = async <Value>(caPath: string | null, work: () => Promise<Value>): Promise<Value> => {
      const before = globalAgent.options.ca;
      globalAgent.options.ca = caPath === null ? [] : [readFileSync(caPath)];
      try {
        return await work();
      } finally {
        globalAgent.options.ca = before;
        globalAgent.destroy();
      }
    };
    try {
      const { path, manifest } = await made('made-6', 6, 0.2);
      await trusting(caFile, async () => {
        await clientOf(`https://127.0.0.1:${port}`).deliver('secure', 'step-6', 3, path, manifest);
        expect((await verifyCheckpoint(join(config.runs, 'secure', 'checkpoints', 'step-6'))).step).to.equal(6);
        expect(await codeOf(clientOf(`https://127.0.0.1:${port}`, 'wrong').check())).to.equal('STORE_AUTH');
        const elsewhere = await clientOf(`https://localhost:${port}`).check().then(() => null, (error: unknown) => error as Error & { code: string });
        expect(elsewhere).to.include({ code: 'STORE_AUTH' }).with.property('message').that.matches(/ERR_TLS_CERT_ALTNAME_INVALID.*host name that its certificate has/);
      });
      const sinceMs = performance.now();
      for (const caPath of [otherCaFile, null]) {
        const error = await trusting(caPath, () => clientOf(`https://127.0.0.1:${port}`).listing('one', 'train')).then(() => null, (thrown: unknown) => thrown as Error & { code: string });
        expect(error).to.include({ code: 'STORE_AUTH' }).with.property('message').that.matches(/^no TLS with the store at https:\/\/127.*NODE_EXTRA_CA_CERTS/);
      }
      expect(performance.now() - sinceMs, 'nothing to wait for').to.be.below(config.store.outageMs);
    } finally {
      await new Promise((resolve) => secure.close(resolve));
    }
  });
});

describe('the cache of a worker’s machine', () => {
  let directory: string;
  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), 'nn-cache-'));
  });
  afterEach(() => rmSync(directory, { recursive: true, force: true }));

  const address = (letter: string): string => letter.repeat(64);
  const files = (bytes: number) => ({ contents: { bytes, sha256: address('0') } });
  const filled = (bytes: number, seen: string[] = []) => (into: string): Promise<void> => {
    seen.push(...readdirSync(into));
    writeFileSync(join(into, 'contents'), Buffer.alloc(bytes));
    return Promise.resolve();
  };
  const opened = async (cacheBytes: number): Promise<Cache> => {
    const cache = new Cache(directory, { cacheBytes, expireMs: 60_000 });
    await cache.open();
    return cache;
  };
  const stamp = (letter: string, seconds: number): void => utimesSync(join(directory, address(letter)), seconds, seconds);

  it('stays within its bytes: what was used longest ago goes, what is held never', async () => {
    const cache = await opened(2_500);
    for (const letter of ['a', 'b']) {
      cache.hold(address(letter));
      await cache.get(address(letter), files(1_000), filled(1_000));
      cache.release(address(letter));
    }
    stamp('a', 1_000);
    stamp('b', 2_000);
    cache.find(address('a'));
    cache.hold(address('c'));
    await cache.get(address('c'), files(1_000), filled(1_000));
    expect([existsSync(join(directory, address('a'))), existsSync(join(directory, address('b')))]).to.deep.equal([true, false]);
    cache.hold(address('a'));
    cache.hold(address('d'));
    await cache.get(address('d'), files(9_000), filled(9_000));
    for (const letter of ['a', 'c', 'd']) expect(existsSync(join(directory, address(letter))), letter).to.equal(true);
    cache.close();
    expect(readdirSync(directory).filter((name) => name.startsWith('.'))).to.deep.equal([]);
  });

  it('leaves alone what another process uses, and carries on what one that is gone began', async () => {
    const gone = Number(execFileSync(process.execPath, ['-p', 'process.pid'], { encoding: 'utf8' }));
    const temporary = (letter: string, pid: number, ending: string): string => join(directory, `.${address(letter)}.${hostname()}.${pid}.01234567.${ending}`);
    for (const letter of ['a', 'b']) {
      mkdirSync(join(directory, address(letter)));
      writeFileSync(join(directory, address(letter), 'contents'), Buffer.alloc(1_000));
    }
    writeFileSync(temporary('a', process.ppid, 'used'), '');
    writeFileSync(temporary('b', gone, 'used'), '');
    mkdirSync(temporary('c', gone, 'partial'));
    writeFileSync(join(temporary('c', gone, 'partial'), 'half'), 'x');
    const cache = await opened(0);
    const seen: string[] = [];
    cache.hold(address('c'));
    await cache.get(address('c'), files(1_000), filled(1_000, seen));
    expect(seen).to.deep.equal(['half']);
    expect([existsSync(join(directory, address('a'))), existsSync(join(directory, address('b')))]).to.deep.equal([true, false]);
  });

  it('a download that is given up is carried on by any other process, at once', async () => {
    const giveUp = (into: string): Promise<void> => {
      writeFileSync(join(into, 'half'), 'x');
      return Promise.reject(new Error('given up'));
    };
    const first = await opened(0);
    first.hold(address('a'));
    expect(await first.get(address('a'), files(1), giveUp).then(() => null, (error: Error) => error.message)).to.equal('given up');
    // Nothing in the names that are left tells of a process, so that none is waited for.
    expect(readdirSync(directory).filter((name) => name.endsWith('.partial'))).to.deep.equal([]);
    const seen: string[] = [];
    const second = await opened(0);
    second.hold(address('a'));
    await second.get(address('a'), files(1), filled(1, seen));
    expect(seen).to.deep.equal(['half']);
    expect(readdirSync(directory)).to.include(address('a')).and.not.include(`${address('a')}.rest`);
  });

  it('waits for a process of this machine that fetches the same, until it is told to stop', async () => {
    const cache = await opened(0);
    mkdirSync(join(directory, `.${address('a')}.${hostname()}.${process.ppid}.01234567.partial`));
    const controller = new AbortController();
    cache.hold(address('a'));
    const waiting = cache.get(address('a'), files(1), () => Promise.reject(new Error('not ours to fill')), controller.signal).then(() => 'found', (error: { code?: string }) => error.code);
    setImmediate(() => controller.abort());
    expect(await waiting).to.equal('CANCELLED');
  });
});
