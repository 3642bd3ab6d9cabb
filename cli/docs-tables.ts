/**
 * Fills the tables of docs/operations.md from the code that they describe: error codes and knobs. `npm run generate` runs
 * this file; test/tidy.test.ts fails when the page is stale. Knows only the marks between which a table stands.
 */
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { ERROR_KINDS } from '../config/errors.ts';
import { aclRules } from '../config/redis-commands.ts';
import { knobs, packageRoot } from '../config/schema.ts';

const row = (cells: readonly string[]): string => `| ${cells.map((cell) => cell.replace(/\|/g, '\\|')).join(' | ')} |`;
const markdown = (head: readonly string[], rows: readonly (readonly string[])[]): string => [head, head.map(() => '---'), ...rows].map(row).join('\n');

/** Long lines end in a backslash, as a shell has it. */
const wrapped = (text: string): string => text.replace(/(.{90,110}?) /g, '$1 \\\n  ');

const TABLES: Record<string, () => string> = {
  errors: () =>
    markdown(
      ['code', 'exit', 'recovery', 'meaning'],
      Object.entries(ERROR_KINDS).map(([code, { exitCode, recovery, meaning }]) => [`\`${code}\``, String(exitCode), recovery, meaning]),
    ),
  acl: () => `\`\`\`\nACL SETUSER nn on >PASSWORD ${wrapped(aclRules('nn'))}\n\`\`\``,
  knobs: () =>
    markdown(
      ['variable', 'knob', 'default', 'meaning'],
      knobs().map(({ name, env, defaultValue, doc }) => [`\`${env}\``, name, defaultValue === '' ? 'empty' : `\`${defaultValue}\``, doc]),
    ),
};

/** The page with every `<!-- table NAME -->` ... `<!-- end -->` filled in anew. */
export function fillTables(page: string): string {
  return page.replace(/(<!-- table (\w+) -->\n)[\s\S]*?(<!-- end -->)/g, (_, open: string, name: string, close: string) => {
    const table = TABLES[name];
    if (table === undefined) throw new Error(`docs: there is no table ${name}`);
    return `${open}\n${table()}\n\n${close}`;
  });
}

export const TABLED_PAGE = 'docs/operations.md';

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const path = join(packageRoot(), TABLED_PAGE);
  writeFileSync(path, fillTables(readFileSync(path, 'utf8')));
}
