/**
 * The command `doctor`: says whether this machine can do what cuda-nn needs, what it has, and every setting with where it
 * comes from; with --golden, whether this build computes what it should. A check returns what it found or throws the error
 * that would stop a run; the first such error ends the command. Called by main.ts.
 */
import { readFileSync, statfsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { availableParallelism, cpus, freemem, platform, release, totalmem } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { execFileSync } from 'node:child_process';
import type { Command } from 'commander';
import { NnError, errorCode } from '../../config/errors.ts';
import { openRedis, redactUrl, redisAddresses } from '../../config/redis.ts';
import { knobs, loadConfig, packageRoot } from '../../config/schema.ts';
import type { Config } from '../../config/schema.ts';
import { describeDevices, whyNoDevice } from '../../cuda/device.ts';
import type { DeviceDescription } from '../../cuda/device.ts';
import { findRedisServer } from '../embedded-redis.ts';
import { homeOwner } from '../home-lock.ts';
import { withLifetime } from '../lifetime.ts';
import { fields, formatBytes, paint, printResult, table } from '../output.ts';
import { checkConfiguredRedis, isUp } from '../stack.ts';
import { luaAdvisory } from '../redis-version.ts';
import { runGolden } from './golden.ts';

interface Finding {
  readonly name: string;
  readonly status: 'ok' | 'warning' | 'failed';
  readonly detail: string;
}

/** What a check found; `warning` where it works but deserves a look. */
interface Outcome {
  readonly detail: string;
  readonly warning?: boolean;
}

interface Setting {
  readonly name: string;
  readonly env: string;
  readonly value: string | number;
  readonly source: 'environment' | 'default';
}

const OLDEST_NODE = [20, 19] as const;
const LOW_DISK_BYTES = 2 * 2 ** 30;

function checkNode(): Outcome {
  const [major = 0, minor = 0] = process.versions.node.split('.').map(Number);
  if (major < OLDEST_NODE[0] || (major === OLDEST_NODE[0] && minor < OLDEST_NODE[1])) {
    throw new NnError('USAGE', `Node ${process.versions.node} is too old; install Node ${OLDEST_NODE.join('.')} or newer`);
  }
  return { detail: `${process.version} on ${platform()} ${process.arch} ${release()}` };
}

/** Compares the installed libraries with what package.json asks for. */
function checkLibraries(): Outcome {
  const require = createRequire(join(packageRoot(), 'package.json'));
  const { dependencies } = require('./package.json') as { dependencies: Record<string, string> };
  const wrong = Object.entries(dependencies).flatMap(([name, wanted]) => {
    const found = installedVersion(name);
    return found === wanted ? [] : [`${name} ${found ?? 'missing'} (wanted ${wanted})`];
  });
  if (wrong.length > 0) return { warning: true, detail: `${wrong.join(', ')}; npm ci mends it` };
  return { detail: `${Object.keys(dependencies).length} as in package.json` };
}

function installedVersion(name: string): string | undefined {
  try {
    return (JSON.parse(readFileSync(join(packageRoot(), 'node_modules', name, 'package.json'), 'utf8')) as { version: string }).version;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
}

const describeDevice = (device: DeviceDescription): string =>
  [
    device.name,
    device.cores === undefined ? '' : `${device.cores} cores`,
    device.isa ?? '',
    device.computeCapability === undefined ? '' : `compute ${device.computeCapability}`,
    formatBytes(device.memoryBytes),
    device.driverVersion === undefined ? '' : `driver ${device.driverVersion}`,
  ]
    .filter((part) => part !== '')
    .join(', ');

/** The CPU library has to be there and of our ABI: LIBRARY_INVALID says otherwise. */
function checkCpu(): Outcome {
  return { detail: describeDevices('cpu').map(describeDevice).join('; ') };
}

/** GPUs are welcome and not needed. */
function checkGpus(): Outcome {
  try {
    const devices = describeDevices('cuda');
    if (devices.length === 0) return { detail: `none found: ${whyNoDevice('cuda') || 'the CUDA library sees none'}` };
    return { detail: devices.map((device) => `cuda:${device.index} ${describeDevice(device)}`).join('; ') };
  } catch (error) {
    if (!['LIBRARY_INVALID', 'DEVICE_UNAVAILABLE'].includes(errorCode(error) ?? '')) throw error;
    return { detail: `none: ${(error as Error).message}` };
  }
}

/** Program and policy of the Redis that would be used. Throws REDIS_UNAVAILABLE, REDIS_AUTH, REDIS_POLICY. */
async function checkRedisServer(config: Config): Promise<Outcome> {
  if (!isUp(config)) {
    const program = findRedisServer(config);
    const version = execFileSync(program, ['--version'], { encoding: 'utf8', timeout: 10_000 });
    const number = /v=(\d+(?:\.\d+)+)/.exec(version)?.[1] ?? 'unknown';
    const kind = /valkey/i.test(version) ? 'valkey' : 'redis';
    return withAdvisory(kind, number, `${kind} ${number} at ${program}, to be embedded`);
  }
  await checkConfiguredRedis(config);
  const { url } = redisAddresses(config);
  const redis = openRedis(url, config, 'command');
  try {
    const info = await redis.info('server');
    const valkey = /valkey_version:(\S+)/.exec(info)?.[1];
    const kind = valkey === undefined ? 'redis' : 'valkey';
    const number = valkey ?? /redis_version:(\S+)/.exec(info)?.[1] ?? 'unknown';
    return withAdvisory(kind, number, `${kind} ${number} at ${redactUrl(url)}, noeviction`);
  } finally {
    redis.disconnect();
  }
}

function withAdvisory(kind: 'redis' | 'valkey', version: string, detail: string): Outcome {
  const advisory = luaAdvisory(kind, version);
  return advisory === undefined ? { detail } : { warning: true, detail: `${detail}; ${advisory}` };
}

/** Free space where runs are written: the nearest directory that exists. */
function checkDisk(config: Config): Outcome {
  let directory = resolve(config.runs);
  for (;;) {
    try {
      const { bavail, bsize } = statfsSync(directory);
      const free = bavail * bsize;
      return { detail: `${formatBytes(free)} free for ${config.runs}`, warning: free < LOW_DISK_BYTES };
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT' || dirname(directory) === directory) throw error;
      directory = dirname(directory);
    }
  }
}

function checkServices(config: Config): Outcome {
  const owner = homeOwner(config.home);
  if (config.redis.url !== '') return { detail: 'those on the configured Redis' };
  return { detail: owner === undefined ? `nothing runs in ${config.home}` : `cuda-nn up runs in ${config.home} (process ${owner.pid})` };
}

/** Every knob with its value and where that comes from; secrets are not shown. */
export function settings(config: Config, environment: NodeJS.ProcessEnv = process.env): Setting[] {
  return knobs().map(({ name, env, sensitive }) => {
    const value = name.split('.').reduce<unknown>((at, key) => (at as Record<string, unknown>)[key], config) as string | number;
    const shown = sensitive && value !== '' ? (URL.canParse(String(value)) ? redactUrl(String(value)) : '***') : value;
    return { name, env, value: shown, source: environment[env] === undefined ? 'default' : 'environment' };
  });
}

const MARKS = { ok: ['green', 'ok'], warning: ['yellow', '!!'], failed: ['red', 'no'] } as const;

async function doctor(options: { golden?: string; device?: string; precision?: string; json?: boolean }): Promise<void> {
  const config = loadConfig();
  if (options.golden !== undefined) {
    runGolden(options.golden, options.device ?? 'cpu', options.precision ?? 'fp32', config.worker.threads, options.json);
    return;
  }
  await withLifetime(async (life) => {
    const checks: [string, () => Outcome | Promise<Outcome>][] = [
      ['Node', checkNode],
      ['libraries', checkLibraries],
      ['processor', () => ({ detail: `${cpus()[0]?.model ?? 'unknown'}, ${availableParallelism()} cores usable` })],
      ['memory', () => ({ detail: `${formatBytes(totalmem())}, ${formatBytes(freemem())} free` })],
      ['native library', checkCpu],
      ['GPUs', checkGpus],
      ['Redis', () => checkRedisServer(config)],
      ['services', () => checkServices(config)],
      ['disk', () => checkDisk(config)],
    ];
    const findings: Finding[] = [];
    let failure: unknown;
    for (const [name, check] of checks) {
      try {
        const { detail, warning } = await life.until(Promise.resolve().then(check));
        findings.push({ name, status: warning === true ? 'warning' : 'ok', detail });
      } catch (error) {
        if (errorCode(error) === undefined) throw error;
        findings.push({ name, status: 'failed', detail: (error as Error).message });
        failure ??= error;
      }
    }
    const values = settings(config);
    printResult(options.json, { ok: failure === undefined, checks: findings, settings: values }, () => [
      ...fields(findings.map(({ name, status, detail }) => [`${paint(MARKS[status][0], MARKS[status][1])} ${name}`, detail] as const)),
      '',
      ...table(
        [{ title: 'SETTING' }, { title: 'VALUE' }, { title: 'FROM' }],
        values.map(({ name, env, value, source }) => [name, String(value === '' ? '-' : value), source === 'default' ? 'default' : env]),
      ),
    ]);
    if (failure !== undefined) throw failure;
  });
}

export function registerDoctor(program: Command): void {
  program
    .command('doctor')
    .option('--golden <file>', 'check this build against a golden model (.safetensors) instead of the machine')
    .option('--device <device>', 'what computes the golden model: cpu or cuda:N', 'cpu')
    .option('--precision <type>', 'fp32, or bf16 on a GPU: against the CPU in float32 with the weights rounded to bf16', 'fp32')
    .option('--json', 'print JSON')
    .description('whether this machine can do it: Node, native library, GPUs, Redis, settings')
    .action(doctor);
}
