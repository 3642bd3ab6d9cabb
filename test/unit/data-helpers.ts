/** What the tests of data/ share: a temporary directory for each test, and the check that a failure is one clear line. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect } from 'chai';
import { errorCode } from '../../config/errors.ts';
import type { ErrorCode } from '../../config/errors.ts';

/** A directory that is there during each test of the suite that calls this, empty at first; or one for the whole suite. */
export function temporaryDirectory(scope: 'test' | 'suite' = 'test'): { path: string; file(name: string): string } {
  const directory = {
    path: '',
    file: (name: string): string => join(directory.path, name),
  };
  const [start, end] = scope === 'test' ? [beforeEach, afterEach] : [before, after];
  start(() => {
    directory.path = mkdtempSync(join(tmpdir(), 'cuda-nn-data-'));
  });
  end(() => {
    rmSync(directory.path, { recursive: true, force: true });
  });
  return directory;
}

function check(error: unknown, code: ErrorCode, texts: readonly (string | RegExp)[]): void {
  expect(errorCode(error), String((error as Error | undefined)?.stack)).to.equal(code);
  const { message } = error as Error;
  expect(message).to.not.include('\n');
  expect(message.length).to.be.below(600);
  for (const text of texts) {
    if (typeof text === 'string') expect(message).to.include(text);
    else expect(message).to.match(text);
  }
}

/** `work` throws our error with `code`, whose message is one line and holds all `texts`. */
export function expectError(work: () => unknown, code: ErrorCode, ...texts: (string | RegExp)[]): void {
  let caught: unknown;
  try {
    work();
  } catch (error) {
    caught = error;
  }
  check(caught, code, texts);
}

/** The same for a promise. */
export async function expectRejection(work: Promise<unknown>, code: ErrorCode, ...texts: (string | RegExp)[]): Promise<void> {
  let caught: unknown;
  try {
    await work;
  } catch (error) {
    caught = error;
  }
  check(caught, code, texts);
}
