/**
 * What the command line writes: results to stdout (text, or one JSON value with --json), everything else to stderr.
 * Tables, colour and the progress bar fit 80 columns; NO_COLOR and streams that are no terminal are respected.
 * Knows nothing of runs or workers. Called by the commands.
 */
import { stripVTControlCharacters } from 'node:util';

const WIDTH = 80;
/** Milliseconds between two paintings of the bar on a terminal, and two lines of progress elsewhere. */
const PAINT_MS = 100;
const LINE_MS = 5000;

type Style = 'bold' | 'dim' | 'red' | 'green' | 'yellow' | 'cyan';
const CODES: Record<Style, readonly [number, number]> = { bold: [1, 22], dim: [2, 22], red: [31, 39], green: [32, 39], yellow: [33, 39], cyan: [36, 39] };

/** Whether colour is wanted on a stream: NO_COLOR wins, then FORCE_COLOR, then whether it is a terminal. */
export function colourOn(stream: { isTTY?: boolean }, environment: NodeJS.ProcessEnv = process.env): boolean {
  if ((environment['NO_COLOR'] ?? '') !== '' || environment['TERM'] === 'dumb') return false;
  const forced = environment['FORCE_COLOR'] ?? '';
  if (forced !== '') return forced !== '0';
  return stream.isTTY === true;
}

/** Paints `text` if the stream shows colour. */
export function paint(style: Style, text: string, stream: { isTTY?: boolean } = process.stdout): string {
  const [on, off] = CODES[style];
  return colourOn(stream) ? `\u001b[${on}m${text}\u001b[${off}m` : text;
}

const width = (text: string): number => Array.from(stripVTControlCharacters(text)).length;

/** Control characters of foreign text (a run's name, an error's message) made visible, so that they cannot drive the terminal. */
export const printable = (text: string): string =>
  text.replace(/\p{Cc}/gu, (each) => `\\x${each.charCodeAt(0).toString(16).padStart(2, '0')}`);

/** Cuts a line to `columns`, with an ellipsis. */
export function fit(text: string, columns = WIDTH): string {
  return width(text) <= columns ? text : `${Array.from(stripVTControlCharacters(text)).slice(0, Math.max(0, columns - 1)).join('')}…`;
}

export interface Column {
  readonly title: string;
  readonly align?: 'left' | 'right';
}

/** A table as lines, columns two spaces apart; the last column is cut where 80 columns end. */
export function table(columns: readonly Column[], rows: readonly (readonly string[])[]): string[] {
  const widths = columns.map(({ title }, at) => Math.max(width(title), ...rows.map((row) => width(row[at] ?? ''))));
  const line = (cells: readonly string[]): string =>
    cells
      .map((cell, at) => {
        const fill = ' '.repeat(Math.max(0, widths[at]! - width(cell)));
        if (columns[at]!.align === 'right') return fill + cell;
        return at === cells.length - 1 ? cell : cell + fill;
      })
      .join('  ')
      .trimEnd();
  return [paint('dim', line(columns.map(({ title }) => title))), ...rows.map(line)].map((text) => (width(text) <= WIDTH ? text : fit(text)));
}

/** `name  value` lines, names aligned. Values that do not fit continue under themselves. */
export function fields(rows: readonly (readonly [name: string, value: string])[]): string[] {
  const left = Math.max(...rows.map(([name]) => width(name))) + 2;
  return rows.flatMap(([name, value]) => wrap(value, WIDTH - left).map((part, at) => (at === 0 ? paint('dim', name.padEnd(left)) : ' '.repeat(left)) + part));
}

/** Breaks at spaces; a word longer than the line (a path, a digest) keeps a line of its own. */
export function wrap(text: string, columns = WIDTH): string[] {
  const lines: string[] = [];
  let line = '';
  for (const word of text.split(' ')) {
    if (line === '') line = word;
    else if (width(line) + 1 + width(word) <= columns) line += ` ${word}`;
    else {
      lines.push(line);
      line = word;
    }
  }
  return [...lines, line];
}

export const formatCount = (value: number): string => Math.round(value).toLocaleString('en-US');
export const formatLoss = (value: number | null | undefined): string => (value === null || value === undefined ? '-' : value.toFixed(3));

export function formatBytes(bytes: number): string {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  const power = bytes < 1 ? 0 : Math.min(units.length - 1, Math.floor(Math.log2(bytes) / 10));
  return `${power === 0 ? bytes : (bytes / 1024 ** power).toFixed(1)} ${units[power]}`;
}

/** `4 s`, `2 min 05 s`, `3 h 12 min`, `5 d 4 h`. */
export function formatDuration(milliseconds: number): string {
  const seconds = Math.max(0, Math.round(milliseconds / 1000));
  if (seconds < 60) return `${seconds} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${String(seconds % 60).padStart(2, '0')} s`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${String(minutes % 60).padStart(2, '0')} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

/** Prints a command's result: the one JSON value, or the lines. */
export function printResult(json: boolean | undefined, value: unknown, lines: () => readonly string[]): void {
  process.stdout.write(json === true ? `${JSON.stringify(value)}\n` : lines().map((line) => `${line}\n`).join(''));
}

let activeBar: ProgressBar | undefined;
const setActiveBar = (bar: ProgressBar | undefined): void => {
  activeBar = bar;
};

/** One line on stderr; a progress bar moves out of its way. */
export function note(text: string): void {
  activeBar?.clear();
  process.stderr.write(`${text}\n`);
  activeBar?.repaint();
}

/**
 * One line of progress on stderr, repainted on a terminal and printed every few seconds elsewhere (so nothing is printed
 * there by what is quickly done). The caller says how much is done and what to show; the bar adds percent and the time left.
 */
export class ProgressBar {
  readonly #label: string;
  readonly #stream: NodeJS.WriteStream;
  readonly #startedAt = performance.now();
  #paintedAt: number;
  #text = '';
  /** What stands there now; empty before the first painting. */
  #shown = '';
  #ended = false;

  constructor(label: string, stream: NodeJS.WriteStream = process.stderr) {
    this.#label = label;
    this.#stream = stream;
    this.#paintedAt = stream.isTTY ? -Infinity : this.#startedAt;
    setActiveBar(this);
  }

  /** `done` of `total` (any unit; total 0: unknown), and what else to show. */
  update(done: number, total: number, detail: string): void {
    const now = performance.now();
    this.#text = this.#line(done, total, detail, now);
    if (now - this.#paintedAt < (this.#stream.isTTY ? PAINT_MS : LINE_MS)) return;
    this.#paintedAt = now;
    this.#show();
  }

  #show(): void {
    this.#stream.write(this.#stream.isTTY ? `\r\u001b[2K${this.#text}` : `${this.#text}\n`);
    this.#shown = this.#text;
  }

  #line(done: number, total: number, detail: string, now: number): string {
    if (total <= 0) return fit(`${this.#label} ${detail}`, this.#columns());
    const share = Math.min(1, done / total);
    const left = done > 0 && done < total ? `, ${formatDuration(((now - this.#startedAt) * (total - done)) / done)} left` : '';
    const tail = `${String(Math.floor(share * 100)).padStart(3)}% ${detail}${left}`;
    const room = Math.min(20, this.#columns() - width(this.#label) - width(tail) - 4);
    const filled = Math.round(share * room);
    const bar = this.#stream.isTTY && room >= 5 ? `${'█'.repeat(filled)}${'░'.repeat(room - filled)} ` : '';
    return fit(`${this.#label} ${bar}${tail}`, this.#columns());
  }

  #columns(): number {
    return this.#stream.isTTY ? Math.min(WIDTH, (this.#stream.columns || WIDTH) - 1) : WIDTH;
  }

  /** Makes room for another line on a terminal; `repaint` brings the bar back below it. */
  clear(): void {
    if (this.#stream.isTTY && this.#shown !== '') this.#stream.write('\r\u001b[2K');
  }

  repaint(): void {
    if (this.#stream.isTTY && this.#shown !== '') this.#show();
  }

  /** Leaves the last line standing, if there was any. Calling it again changes nothing. */
  end(): void {
    if (this.#ended) return;
    this.#ended = true;
    if (activeBar === this) setActiveBar(undefined);
    if (this.#shown === '') return;
    if (this.#stream.isTTY || this.#shown !== this.#text) this.#show();
    if (this.#stream.isTTY) this.#stream.write('\n');
  }
}
