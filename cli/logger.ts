/**
 * The log of long-lived processes: pino, as JSON lines or, on a terminal, as short human lines; always on stderr, with
 * the passwords of addresses taken out. Called by stack.ts.
 */
import { pino } from 'pino';
import type { Logger } from 'pino';
import { redactUrl } from '../config/redis.ts';
import type { Config } from '../config/schema.ts';
import { note } from './output.ts';

const LEVELS: Record<number, string> = { 10: 'trace', 20: 'debug', 30: 'info', 40: 'warning', 50: 'error', 60: 'fatal' };
/** What pino puts on every line and a human does not need. */
const COMMON = new Set(['level', 'time', 'pid', 'hostname', 'msg', 'name']);

/** One line of a log for people: time, level unless it is info, message, then what else it holds. */
export function humanLine(line: string): string {
  const entry = JSON.parse(line) as Record<string, unknown> & { level: number; time: number; msg?: string };
  const time = new Date(entry.time).toISOString().slice(11, 19);
  const level = entry.level === 30 ? '' : `${LEVELS[entry.level] ?? entry.level}: `;
  const rest = Object.entries(entry).filter(([key]) => !COMMON.has(key)).map(([key, value]) => `${key}=${typeof value === 'string' ? value : JSON.stringify(value)}`);
  return [`${time} ${level}${entry.msg ?? ''}`, ...rest].join(' ');
}

/** A logger of the configured level. */
export function createLogger(config: Config): Logger {
  const human = process.stderr.isTTY;
  return pino(
    { level: config.logLevel, base: {} },
    {
      write: (line: string) => {
        const safe = line.trimEnd().replace(/\b(?:rediss?|unix):\/\/[^\s"]+/g, redactUrl);
        note(human ? humanLine(safe) : safe);
      },
    },
  );
}
