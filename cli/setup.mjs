/**
 * Makes a fresh checkout ready to run, and does nothing where it is ready: dependencies from the lock file, the native
 * library, the TypeScript build, a Redis server. Plain Node without dependencies, because nothing is installed yet.
 * Called by the npm scripts and .ci/run. Everything it says goes to stderr; stdout belongs to the command that follows.
 *
 *   node cli/setup.mjs [--quiet] [--without-redis]
 *
 * Exit codes: those of config/errors.ts (4: the environment lacks something), 70: a build failed.
 */
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { accessSync, chmodSync, constants, existsSync, mkdirSync, readFileSync, readdirSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { delimiter, dirname, join, relative } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const quiet = process.argv.includes('--quiet');
const lockFile = join(root, '.cuda-nn', 'setup.lock');
const stampFile = join(root, 'dist', '.setup.json');
const OLDEST_NODE = [20, 19];
const LOCK_TIMEOUT_MS = 15 * 60_000;
const LOCK_POLL_MS = 200;

const say = (line) => process.stderr.write(`setup: ${line}\n`);

/** Ends the set-up with one line. */
class SetupError extends Error {
  constructor(code, exitCode, message) {
    super(`${code}: ${message}`);
    this.exitCode = exitCode;
  }
}

function checkNode() {
  const [major, minor] = process.versions.node.split('.').map(Number);
  if (major > OLDEST_NODE[0] || (major === OLDEST_NODE[0] && minor >= OLDEST_NODE[1])) return;
  throw new SetupError('USAGE', 2, `Node ${process.versions.node} is too old; install Node ${OLDEST_NODE.join('.')} or newer`);
}

/** The path of a program, or undefined. */
function onPath(program) {
  if (program.includes('/')) return existsSync(program) ? program : undefined;
  for (const directory of (process.env.PATH ?? '').split(delimiter)) {
    const path = join(directory || '.', program);
    try {
      accessSync(path, constants.X_OK);
      if (statSync(path).isFile()) return path;
    } catch (error) {
      if (!['ENOENT', 'EACCES', 'ENOTDIR'].includes(error.code)) throw error;
    }
  }
  return undefined;
}

/** Runs a program with its output on stderr; with --quiet the output is shown only if it fails. */
function run(program, args, { env = process.env } = {}) {
  const result = spawnSync(program, args, {
    cwd: root,
    env,
    encoding: 'utf8',
    maxBuffer: 64 << 20,
    stdio: quiet ? ['ignore', 'pipe', 'pipe'] : ['ignore', 2, 2],
  });
  if (result.status !== 0 && quiet) process.stderr.write(`${result.stdout ?? ''}${result.stderr ?? ''}`);
  return result.status === 0;
}

const readJson = (path) => {
  try {
    return JSON.parse(readFileSync(path, 'utf8'));
  } catch (error) {
    if (error.code === 'ENOENT' || error instanceof SyntaxError) return undefined;
    throw error;
  }
};

/** Whether node_modules holds what package-lock.json asks for: npm's own record of what it installed says so. */
function dependenciesFresh() {
  const wanted = readJson(join(root, 'package-lock.json'))?.packages ?? {};
  const installed = readJson(join(root, 'node_modules', '.package-lock.json'))?.packages;
  if (installed === undefined) return false;
  return Object.entries(wanted).every(
    ([path, entry]) => path === '' || entry.optional || entry.peer || (installed[path]?.version === entry.version && existsSync(join(root, path))),
  );
}

function installDependencies() {
  say('installing dependencies (npm ci)');
  const npm = process.env.npm_execpath;
  const [program, first] = npm !== undefined && /\.c?js$/.test(npm) ? [process.execPath, [npm]] : ['npm', []];
  if (!run(program, [...first, 'ci', '--include=dev', '--no-audit', '--no-fund', '--loglevel=error'])) {
    throw new SetupError('USAGE', 4, 'npm ci failed (its messages are above); is the package registry reachable?');
  }
}

/** Every TypeScript source, relative to the root, sorted. */
function sources() {
  const { include } = JSON.parse(readFileSync(join(root, 'tsconfig.json'), 'utf8'));
  return include
    .flatMap((directory) => (existsSync(join(root, directory)) ? readdirSync(join(root, directory), { recursive: true }).map((file) => join(directory, file)) : []))
    .filter((file) => file.endsWith('.ts'))
    .sort();
}

function sourceDigest(files) {
  const hash = createHash('sha256');
  for (const file of [...files, 'tsconfig.json', 'package-lock.json']) hash.update(`${file}\0`).update(readFileSync(join(root, file)));
  return hash.digest('hex');
}

const typescriptFresh = (digest) => existsSync(join(root, 'dist', 'cli', 'main.js')) && readJson(stampFile)?.sources === digest;

/** Removes what was built from sources that are gone, so that no deleted test runs. */
function prune(files) {
  const expected = new Set(files.map((file) => file.slice(0, -'.ts'.length)));
  for (const file of readdirSync(join(root, 'dist'), { recursive: true })) {
    const stem = /^(.*?)(\.d\.ts|\.js\.map|\.js)$/.exec(file)?.[1];
    if (stem !== undefined && !expected.has(stem)) rmSync(join(root, 'dist', file));
  }
}

function buildTypescript(files, digest) {
  say('building TypeScript');
  rmSync(stampFile, { force: true });
  const started = performance.now();
  if (!run(process.execPath, [join(root, 'node_modules', 'typescript', 'bin', 'tsc'), '-p', root, '--pretty', 'false'])) {
    throw new SetupError('BUG', 70, 'the TypeScript build failed (its messages are above)');
  }
  prune(files);
  chmodSync(join(root, 'dist', 'cli', 'main.js'), 0o755); // the package's bin
  writeFileSync(stampFile, `${JSON.stringify({ sources: digest })}\n`);
  if (!quiet) say(`TypeScript built in ${((performance.now() - started) / 1000).toFixed(1)} s`);
}

const redisHint = 'install it (Debian: apt-get install redis-server), or set CUDA_NN_REDIS_URL to a Redis of yours';

/** Finds a Redis server, or installs Debian's package where that may be done. */
function provideRedis() {
  if (process.env.CUDA_NN_REDIS_URL) return;
  const named = process.env.CUDA_NN_REDIS_SERVER;
  if (named) {
    if (onPath(named) === undefined) throw new SetupError('REDIS_UNAVAILABLE', 4, `CUDA_NN_REDIS_SERVER names ${named}, which is no program`);
    return;
  }
  if (onPath('redis-server') !== undefined || onPath('valkey-server') !== undefined) return;
  if (process.platform !== 'linux' || process.getuid() !== 0 || onPath('apt-get') === undefined) {
    throw new SetupError('REDIS_UNAVAILABLE', 4, `there is no redis-server or valkey-server on the PATH; ${redisHint}`);
  }
  say('installing Debian’s package redis-server (apt-get)');
  // The package would start a service; we only want the program. RUNLEVEL speaks to sysv, SYSTEMD_OFFLINE to systemctl.
  const env = { ...process.env, DEBIAN_FRONTEND: 'noninteractive', RUNLEVEL: '1', SYSTEMD_OFFLINE: '1' };
  const packages = ['install', '-y', '-q', '--no-install-recommends', 'redis-server'];
  const installed = run('apt-get', ['update', '-q'], { env }) && run('apt-get', packages, { env });
  if (!installed || onPath('redis-server') === undefined) {
    throw new SetupError('REDIS_UNAVAILABLE', 4, `apt-get could not install redis-server (its messages are above); ${redisHint}`);
  }
  if (existsSync('/run/systemd/system') && !run('systemctl', ['disable', 'redis-server'], { env })) say('the service redis-server stays enabled');
}

const alive = (pid) => {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return error.code === 'EPERM';
  }
};

/** One set-up at a time: the others wait for it, then find everything done. */
async function locked(work) {
  mkdirSync(dirname(lockFile), { recursive: true });
  const deadline = Date.now() + LOCK_TIMEOUT_MS;
  for (let told = false; ; ) {
    try {
      writeFileSync(lockFile, String(process.pid), { flag: 'wx' });
      break;
    } catch (error) {
      if (error.code !== 'EEXIST') throw error;
    }
    const owner = existsSync(lockFile) ? Number(readFileSync(lockFile, 'utf8')) : 0;
    if (owner > 0 && !alive(owner)) {
      rmSync(lockFile, { force: true });
      continue;
    }
    if (Date.now() > deadline) throw new SetupError('TIMEOUT', 4, `another set-up (process ${owner}) holds ${lockFile}; remove the file if it hangs`);
    if (!told) say(`waiting for another set-up (process ${owner})`);
    told = true;
    await new Promise((resolve) => setTimeout(resolve, LOCK_POLL_MS));
  }
  try {
    return await work();
  } finally {
    rmSync(lockFile, { force: true });
  }
}

async function setUp() {
  if (!dependenciesFresh()) installDependencies();
  const { buildNative } = await import(pathToFileURL(join(root, 'cuda', 'build.mjs')).href);
  // Speaks, on stderr, only when there is something to build. The CUDA library takes minutes: only where there is a driver to run it.
  await buildNative({ cuda: existsSync('/proc/driver/nvidia/version') ? 'auto' : false });
  const files = sources();
  const digest = sourceDigest(files);
  if (!typescriptFresh(digest)) {
    mkdirSync(join(root, 'dist'), { recursive: true });
    buildTypescript(files, digest);
  }
  if (!process.argv.includes('--without-redis')) provideRedis();
}

async function main() {
  const unknown = process.argv.slice(2).find((argument) => !['--quiet', '--without-redis'].includes(argument));
  if (unknown !== undefined) throw new SetupError('USAGE', 2, `unknown option ${unknown} (known: --quiet --without-redis)`);
  checkNode();
  await locked(setUp);
  if (!quiet) say(`ready (${relative(process.cwd(), join(root, 'dist')) || 'dist'})`);
}

// A signal must release the lock too; children got the same signal from the terminal.
for (const signal of ['SIGINT', 'SIGTERM']) {
  process.on(signal, () => {
    if (existsSync(lockFile) && readFileSync(lockFile, 'utf8') === String(process.pid)) rmSync(lockFile, { force: true });
    process.exit(signal === 'SIGINT' ? 130 : 143);
  });
}

try {
  await main();
} catch (error) {
  const expected = typeof error.exitCode === 'number';
  const line = expected ? error.message : typeof error.code === 'string' ? `${error.code}: ${error.message}` : `BUG: ${error.stack}`;
  process.stderr.write(`cuda-nn: ${line}\n`);
  process.exitCode = expected ? error.exitCode : ['COMPILER_MISSING', 'LIBRARY_INVALID'].includes(error.code) ? 4 : 70;
}
