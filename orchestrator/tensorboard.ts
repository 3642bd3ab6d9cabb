/**
 * Writes TensorBoard event files: TFRecord framing with masked crc32c, and the few protobuf fields that a scalar needs.
 * Called by metrics.ts. Format: tensorflow/core/lib/io/record_writer.cc and core/util/event.proto.
 */
import { closeSync, openSync, writeSync } from 'node:fs';
import { hostname } from 'node:os';
import { join } from 'node:path';
import type { MetricsLine } from './run-state.ts';

const table = Uint32Array.from({ length: 256 }, (_, byte) => {
  let crc = byte;
  for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ 0x82f63b78 : crc >>> 1;
  return crc >>> 0;
});

/** CRC-32C (Castagnoli), as an unsigned number. */
export function crc32c(bytes: Uint8Array): number {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = table[(crc ^ byte) & 0xff]! ^ (crc >>> 8);
  return (crc ^ 0xffffffff) >>> 0;
}

/** The checksum of TFRecord: rotated and shifted, so that the crc of data which holds crcs stays sound. */
export const maskedCrc = (bytes: Uint8Array): number => {
  const crc = crc32c(bytes);
  return (((crc >>> 15) | (crc << 17)) + 0xa282ead8) >>> 0;
};

function varint(value: number): number[] {
  const bytes: number[] = [];
  let rest = value;
  while (rest > 127) {
    bytes.push((rest % 128) | 128);
    rest = Math.floor(rest / 128);
  }
  return [...bytes, rest];
}

const double = (field: number, value: number): Buffer => {
  const bytes = Buffer.alloc(9);
  bytes[0] = (field << 3) | 1;
  bytes.writeDoubleLE(value, 1);
  return bytes;
};
const float = (field: number, value: number): Buffer => {
  const bytes = Buffer.alloc(5);
  bytes[0] = (field << 3) | 5;
  bytes.writeFloatLE(value, 1);
  return bytes;
};
const integer = (field: number, value: number): Buffer => Buffer.from([field << 3, ...varint(value)]);
const bytesField = (field: number, value: Uint8Array): Buffer => Buffer.concat([Buffer.from([(field << 3) | 2, ...varint(value.length)]), value]);
const text = (field: number, value: string): Buffer => bytesField(field, Buffer.from(value));

/** One TFRecord: length, its checksum, data, its checksum. */
export function frame(data: Uint8Array): Buffer {
  const record = Buffer.alloc(16 + data.length);
  record.writeBigUInt64LE(BigInt(data.length), 0);
  record.writeUInt32LE(maskedCrc(record.subarray(0, 8)), 8);
  record.set(data, 12);
  record.writeUInt32LE(maskedCrc(data), 12 + data.length);
  return record;
}

/** An Event with one summary of scalars. */
export function scalarEvent(atMs: number, step: number, scalars: Readonly<Record<string, number>>): Buffer {
  const values = Object.entries(scalars).map(([tag, value]) => bytesField(1, Buffer.concat([text(1, tag), float(2, value)])));
  return Buffer.concat([double(1, atMs / 1000), integer(2, step), bytesField(5, Buffer.concat(values))]);
}

/** An Event with a SessionLog of status START: TensorBoard drops the points that it has of `step` and beyond. */
export const restartEvent = (atMs: number, step: number): Buffer => Buffer.concat([double(1, atMs / 1000), integer(2, step), bytesField(7, integer(1, 1))]);

const versionEvent = (atMs: number): Buffer => Buffer.concat([double(1, atMs / 1000), text(3, 'brain.Event:2')]);

/** The scalars of a line of the metrics; what is not finite is left out. */
function scalarsOf(line: Exclude<MetricsLine, { type: 'rollback' }>): Record<string, number> {
  const all: Record<string, number | null> = {};
  if (line.type === 'eval') all['loss/validation'] = line.loss;
  else {
    const { report } = line;
    const aux = report.auxLoss.filter((value): value is number => value !== null);
    all['loss/train'] = report.loss;
    all['loss/aux'] = aux.length === 0 ? null : aux.reduce((sum, value) => sum + value, 0) / aux.length;
    all['optimizer/learning_rate'] = report.learningRate;
    all['optimizer/gradient_norm'] = report.gradientNorm;
    all['speed/tokens_per_second'] = line.tokensPerSecond;
  }
  return Object.fromEntries(Object.entries(all).filter((entry): entry is [string, number] => entry[1] !== null && Number.isFinite(entry[1])));
}

/** Appends to one event file of its own; TensorBoard reads all files of a directory as one run. */
export class TensorBoardWriter {
  readonly #directory: string;
  readonly #atMs: number;
  #descriptor: number | null = null;
  #failed = false;

  constructor(directory: string, atMs: number) {
    this.#directory = directory;
    this.#atMs = atMs;
  }

  /** Charts can be drawn again from metrics.jsonl, so a disk that is full costs them points and nothing else. */
  append(line: MetricsLine): void {
    if (this.#failed) return;
    try {
      this.#append(line);
    } catch (error) {
      this.#failed = true;
      const { code } = error as NodeJS.ErrnoException;
      if (code !== 'ENOSPC' && code !== 'EDQUOT') throw error;
    }
  }

  #append(line: MetricsLine): void {
    if (this.#descriptor === null) {
      const name = `events.out.tfevents.${Math.floor(this.#atMs / 1000)}.${hostname()}.${process.pid}.${this.#atMs % 1000}`;
      this.#descriptor = openSync(join(this.#directory, name), 'a');
      writeSync(this.#descriptor, frame(versionEvent(this.#atMs)));
    }
    if (line.type === 'rollback') {
      writeSync(this.#descriptor, frame(restartEvent(line.atMs, line.toStep + 1)));
      return;
    }
    const step = line.type === 'eval' ? line.step : line.report.step;
    writeSync(this.#descriptor, frame(scalarEvent(line.atMs, step, scalarsOf(line))));
  }

  close(): void {
    if (this.#descriptor !== null) closeSync(this.#descriptor);
  }
}
