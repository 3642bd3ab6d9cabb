/**
 * What a linter does not see of the house style: how files open, how long they and their lines are, which way imports point,
 * and whether what is generated or listed in the docs still says what the code says. docs/2-learn.md explains the arrows.
 */
import { readFileSync, readdirSync } from 'node:fs';
import { join, posix, sep } from 'node:path';
import { expect } from 'chai';
import { TABLED_PAGE, fillTables } from '../cli/docs-tables.ts';
import { ERROR_KINDS } from '../config/errors.ts';
import { packageRoot } from '../config/schema.ts';
import { generateBindings } from '../cuda/generate-bindings.ts';

const FOLDERS = ['config', 'data', 'cuda', 'workers', 'orchestrator', 'cli', 'bench', 'test', 'examples'] as const;
const CODE = /\.(ts|mjs|c|h|cu|cuh)$/;
const GENERATED = /\.generated\.ts$/;
const LONGEST_LINE = 200;
const LONGEST_FILE = 900;

/** Folder -> the folders that it may import from, besides itself. */
const ARROWS: Record<(typeof FOLDERS)[number], readonly string[]> = {
  config: [],
  data: ['config'],
  cuda: ['config'],
  workers: ['config', 'cuda', 'data'],
  orchestrator: ['config', 'data'],
  cli: ['config', 'data', 'cuda', 'workers', 'orchestrator'],
  bench: ['config', 'data', 'cuda', 'workers', 'orchestrator', 'test'],
  test: [...FOLDERS],
  examples: ['config', 'orchestrator'],
};

/** Foreign library -> the only files that import it (tests are free). */
const BOUNDARIES: Record<string, readonly string[]> = {
  koffi: ['cuda/device.ts', 'cuda/bindings.generated.ts'],
  piscina: ['workers/pool.ts'],
  bullmq: ['orchestrator/queues.ts', 'workers/worker.ts'],
  ioredis: ['config/redis.ts'],
};

const root = packageRoot();
const read = (file: string): string => readFileSync(join(root, file), 'utf8');
const files = FOLDERS.flatMap((folder) =>
  readdirSync(join(root, folder), { recursive: true, encoding: 'utf8' })
    .filter((file) => CODE.test(file))
    .map((file) => posix.join(folder, file.split(sep).join('/'))),
);
const written = files.filter((file) => !GENERATED.test(file));

/** Every module that a file names in an import, an export from, or a dynamic import. */
function imports(file: string): string[] {
  return [...read(file).matchAll(/(?:\bfrom|\bimport)\s*\(?\s*'([^']+)'/g)].map((match) => match[1]!);
}

describe('tidy', () => {
  it('found the code', () => {
    expect(files.length).to.be.above(60);
  });

  it('every file opens by saying what it owns', () => {
    const silent = written.filter((file) => {
      const text = read(file).replace(/^#!.*\n/, '');
      const opening = /^(\/\*[\s\S]*?\*\/|(?:\/\/[^\n]*\n)+)/.exec(text)?.[0] ?? '';
      return opening.replace(/[\s*/]+/g, ' ').trim().length < 40;
    });
    expect(silent).to.deep.equal([]);
  });

  it('no file and no line is beyond reading', () => {
    const long = written.flatMap((file) => {
      const lines = read(file).split('\n');
      return [
        ...(lines.length > LONGEST_FILE ? [`${file}: ${lines.length} lines`] : []),
        ...lines.flatMap((line, at) => (Array.from(line).length > LONGEST_LINE ? [`${file}:${at + 1}: ${Array.from(line).length} columns`] : [])),
      ];
    });
    expect(long).to.deep.equal([]);
  });

  it('nothing is left open', () => {
    const words = /\b(?:TOD[O]|FIXM[E]|XX[X]|HAC[K]|not implemente[d])\b/; // classes, so that this line is not one of them
    expect(written.filter((file) => words.test(read(file)))).to.deep.equal([]);
  });

  it('no test is alone, or switched off but for a reason that it prints', () => {
    const tests = written.filter((file) => file.startsWith('test/'));
    expect(tests.filter((file) => /\b(?:describe|it)\.(?:only\(|skip\(\s*')/.test(read(file)))).to.deep.equal([]);
  });

  it('imports follow the arrows', () => {
    const wrong = files.filter((file) => file.endsWith('.ts')).flatMap((file) => {
      const folder = file.split('/')[0] as (typeof FOLDERS)[number];
      return imports(file)
        .filter((name) => name.startsWith('.'))
        .map((name) => posix.join(posix.dirname(file), name).split('/')[0]!)
        .filter((target) => target !== folder && !ARROWS[folder].includes(target))
        .map((target) => `${file} -> ${target}`);
    });
    expect(wrong).to.deep.equal([]);
  });

  it('foreign libraries are used only at their boundary', () => {
    const wrong = Object.entries(BOUNDARIES).flatMap(([library, owners]) =>
      files
        .filter((file) => file.endsWith('.ts') && !file.startsWith('test/') && !owners.includes(file))
        .filter((file) => imports(file).includes(library))
        .map((file) => `${file} -> ${library}`),
    );
    expect(wrong).to.deep.equal([]);
  });

  it('relative imports name the source file', () => {
    const wrong = files
      .filter((file) => file.endsWith('.ts'))
      .flatMap((file) => imports(file).filter((name) => name.startsWith('.') && !/\.(ts|mjs|json)$/.test(name)).map((name) => `${file} -> ${name}`));
    expect(wrong).to.deep.equal([]);
  });

  it('the bindings are those of nn.h (npm run generate)', () => {
    expect(read('cuda/bindings.generated.ts') === generateBindings(read('cuda/include/nn.h'))).to.equal(true);
  });

  it('the docs list every error code and every setting, and no other (npm run generate)', () => {
    expect(fillTables(read(TABLED_PAGE)) === read(TABLED_PAGE)).to.equal(true);
  });

  it('the docs say of every error code what to do', () => {
    const page = read(TABLED_PAGE);
    const advice = page.slice(page.indexOf('\nWhat to do:\n'), page.indexOf('\n## Settings'));
    expect(Object.keys(ERROR_KINDS).filter((code) => !new RegExp(`^- [^:]*\`${code}\``, 'm').test(advice))).to.deep.equal([]);
  });

  it('every error code is raised somewhere, and met by a test', () => {
    const sources = written.filter((file) => !file.startsWith('test/') && file !== 'config/errors.ts').map(read).join('\n');
    const tests = written.filter((file) => file.startsWith('test/')).map(read).join('\n');
    const codes = Object.keys(ERROR_KINDS);
    expect(codes.filter((code) => !sources.includes(`'${code}'`)), 'never raised').to.deep.equal([]);
    expect(codes.filter((code) => !tests.includes(code)), 'in no test').to.deep.equal([]);
  });

  it('the README and the docs name only files that are there', () => {
    const pages = ['README.md', 'docs/1-model.md', 'docs/2-learn.md', 'docs/operations.md'];
    const wrong = pages.flatMap((page) =>
      [...read(page).matchAll(/`((?:config|data|cuda|workers|orchestrator|cli|bench|test|examples|docker)\/[\w./-]+\.\w+)`/g)]
        .map((match) => match[1]!)
        .filter((path) => !existing(path))
        .map((path) => `${page}: ${path}`),
    );
    expect(wrong).to.deep.equal([]);
  });
});

function existing(path: string): boolean {
  const folder = posix.dirname(path);
  return readdirSync(join(root, folder)).includes(posix.basename(path));
}
