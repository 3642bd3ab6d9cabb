/**
 * Where a step's time goes: every kernel call timed by itself with the device's events, added up by kernel. Knows no benchmark and
 * no trainer, only the object through which all of them call kernels. Used by gpu-train.ts.
 */
import type { Device } from '../cuda/device.ts';
import { significant } from './statistics.ts';
import type { Row } from './statistics.ts';

/**
 * Runs `calls` with each kernel waited for, and returns a row a kernel, the longest first: calls, milliseconds, share of their sum.
 * Products are told apart by their sizes. What a graph replays is no kernel call: `calls` must launch them one by one.
 */
export function breakDown(device: Device, calls: () => void): Row[] {
  const spent = new Map<string, { calls: number; ms: number }>();
  const kernels = device.kernels as unknown as Record<string, unknown>;
  const names = Object.getOwnPropertyNames(Object.getPrototypeOf(kernels)).filter((name) => name !== 'constructor');
  for (const name of names) {
    const kernel = (kernels[name] as (...args: unknown[]) => void).bind(kernels);
    kernels[name] = (...args: unknown[]): void => {
      const what = name.startsWith('gemm') ? `${name} ${args.slice(3, 6).join(' x ')}` : name;
      const ms = device.time(() => kernel(...args));
      const sum = spent.get(what) ?? { calls: 0, ms: 0 };
      spent.set(what, { calls: sum.calls + 1, ms: sum.ms + ms });
    };
  }
  try {
    calls();
  } finally {
    // The methods of the class come back from behind our own.
    for (const name of names) delete kernels[name];
  }
  const all = [...spent.values()].reduce((sum, { ms }) => sum + ms, 0);
  return [...spent]
    .sort(([, a], [, b]) => b.ms - a.ms)
    .map(([name, { calls: count, ms }]) => ({ name, calls: count, ms: significant(ms, 4), share: significant(ms / all, 3) }));
}
