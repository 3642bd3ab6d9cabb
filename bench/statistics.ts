/**
 * What the benchmarks share: medians, timing loops, the machine's description, and printing a report as a table or as
 * JSON. Knows no benchmark.
 */
import { execFileSync } from 'node:child_process';
import { cpus } from 'node:os';

export interface Row {
  readonly name: string;
  readonly [column: string]: string | number | boolean | null;
}

export interface Report {
  readonly bench: string;
  /** Figures of the whole benchmark, and what was measured them on. */
  readonly summary: Readonly<Record<string, string | number | boolean | null>>;
  readonly rows: readonly Row[];
  /** False if a comparison with a reference or a requirement failed. */
  readonly passed: boolean;
}

/** The value below which a share `quantile` (0..1) of the values lies, by nearest rank. */
export function quantile(values: readonly number[], share: number): number {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.max(0, Math.ceil(share * sorted.length) - 1))] ?? Number.NaN;
}

export const median = (values: readonly number[]): number => quantile(values, 0.5);

/** Rounds to `digits` significant digits. */
export const significant = (value: number, digits = 4): number => Number(value.toPrecision(digits));

/** Milliseconds of each of `count` calls, after `warmup` calls that do not count. */
export function timeCalls(call: () => void, count: number, warmup: number): number[] {
  for (let index = 0; index < warmup; index++) call();
  return Array.from({ length: count }, () => {
    const start = performance.now();
    call();
    return performance.now() - start;
  });
}

/** Machine and commit, which every report carries. */
export function provenance(): Record<string, string | number> {
  let commit = 'unknown';
  try {
    commit = execFileSync('git', ['rev-parse', '--short', 'HEAD'], { encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] }).trim();
  } catch {
    commit = 'not a git checkout';
  }
  return { machine: cpus()[0]?.model ?? 'unknown', cores: cpus().length, commit, node: process.version };
}

export function printReport(report: Report, asJson: boolean): void {
  if (asJson) {
    process.stdout.write(`${JSON.stringify({ bench: report.bench, passed: report.passed, ...report.summary, rows: report.rows })}\n`);
    return;
  }
  for (const [key, value] of Object.entries(report.summary)) process.stdout.write(`${key.padEnd(26)} ${value}\n`);
  const columns = [...new Set(report.rows.flatMap((row) => Object.keys(row)))];
  const cells = [columns, ...report.rows.map((row) => columns.map((column) => String(row[column] ?? '')))];
  const widths = columns.map((_, at) => Math.max(...cells.map((line) => line[at]!.length)));
  for (const line of cells) process.stdout.write(`${line.map((cell, at) => (at === 0 ? cell.padEnd(widths[at]!) : cell.padStart(widths[at]!))).join('  ')}\n`);
  process.stdout.write(report.passed ? 'passed\n' : 'FAILED\n');
}
