/**
 * runs/<id>/history.jsonl: what counted, by which driver, in which epoch, from whose gradients; so that anybody can check
 * afterwards that each (step, shard) counted once (test/support/history.ts does). Written as it comes: nothing is left out
 * because it was there before. Lines come from the run machine through driver.ts; metrics.jsonl is written first, so that a
 * crash between the two leaves a step that only the metrics hold, and `taken` of the next driver says how far they went.
 *
 * A flow writes a line for each shard's report and two a step, the local way one a step and one a job, of about 150 bytes. At
 * FILE_BYTES the file becomes history.1.jsonl, in place of the one before.
 */
import { renameSync } from 'node:fs';
import { join } from 'node:path';
import { errorCode } from '../config/errors.ts';
import type { RunPhase } from '../config/messages.ts';
import { LineFile } from './line-file.ts';
import type { HistoryEvent } from './run-state.ts';

const FILE_BYTES = 64 << 20;
/** Of a driver's token: enough to tell two drivers of one run apart. */
const TOKEN_LENGTH = 8;

/** A driver took the run up: from here on every line is its own. `step`: steps counted; `checkpoint`: step of the newest, or 0; `branch`: rollbacks so far, absent: 0. */
export interface TakenEvent {
  readonly type: 'taken';
  readonly atMs: number;
  readonly epoch: number;
  readonly phase: RunPhase;
  readonly step: number;
  readonly checkpoint: number;
  readonly branch?: number;
}
/** A line of history.jsonl. */
export type HistoryLine = { readonly driver: string } & (HistoryEvent | TakenEvent);

export class History {
  readonly #driver: string;
  #file: LineFile;
  readonly #fileBytes: number;

  /** `token`: the driver's, as its run in Redis has it. Takes the file over from whoever wrote it before. */
  constructor(directory: string, token: string, fileBytes = FILE_BYTES) {
    this.#driver = token.slice(0, TOKEN_LENGTH);
    this.#file = new LineFile(join(directory, 'history.jsonl'), false);
    this.#fileBytes = fileBytes;
  }

  /** Throws DISK_FULL, and then keeps the line for the next append. */
  append(event: HistoryEvent | TakenEvent): void {
    if (this.#file.bytes >= this.#fileBytes && this.#file.owned) this.#rotate();
    this.#file.append({ driver: this.#driver, ...event } satisfies HistoryLine);
  }

  /** On a full disk the file grows on. */
  #rotate(): void {
    const { path } = this.#file;
    const old = path.replace(/\.jsonl$/, '.1.jsonl');
    this.#file.sync();
    renameSync(path, old);
    try {
      const next = new LineFile(path, false);
      this.#file.close();
      this.#file = next;
    } catch (error) {
      renameSync(old, path);
      if (errorCode(error) !== 'DISK_FULL') throw error;
    }
  }

  /** Everything appended is on the disk when this returns. Throws DISK_FULL. */
  sync(): void {
    this.#file.sync();
  }

  close(): void {
    this.#file.close();
  }
}
