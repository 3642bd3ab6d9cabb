/**
 * Builds the native library: cuda/cpu/*.c to dist/native/libnn_cpu.so (.dylib on macOS). Plain JavaScript, no dependencies, because
 * it runs before anything is installed or compiled: `node cuda/build.mjs [--quiet] [--cuda]`, or buildNative() from cli/setup.mjs.
 *
 * Owns compilers, flags and what is up to date. A source named *.simd.c is compiled once for each instruction set (see
 * cuda/cpu/internal.h). An object is named by the hash of all that it is made of, so that what is there need not be made again.
 * Nothing is tuned to the machine that builds: the library chooses its instruction set when it runs.
 */
import { execFile, spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readFileSync, readdirSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { delimiter, dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const sourceDirectory = join(root, 'cuda', 'cpu');
const kernelDirectory = join(root, 'cuda', 'kernels');
const includeDirectory = join(root, 'cuda', 'include');
const outputDirectory = join(root, 'dist', 'native');
const objectDirectory = join(outputDirectory, 'objects');
const macos = process.platform === 'darwin';
const extension = macos ? 'dylib' : 'so';
const compileTimeoutMs = 1_800_000;

const commonFlags = [
  '-std=gnu11', '-O3', '-fPIC', '-fvisibility=hidden', '-fno-math-errno', '-fno-trapping-math',
  '-Wall', '-Wextra', '-Werror=implicit', '-Wno-unknown-pragmas', '-Wno-psabi',
];
// nodelete: a worker thread that ends must not unload the library under its threads. initfirst: see spin_briefly in context.c.
const linkFlags = macos ? ['-dynamiclib'] : ['-shared', '-Wl,-z,nodelete', '-Wl,-z,initfirst', '-Wl,-z,defs'];

/** Instruction sets of *.simd.c: the flags and the macro that simd.h looks at. */
const instructionSets =
  process.arch === 'x64'
    ? {
        plain: [],
        avx2: ['-DNN_BUILD_AVX2', '-mavx2', '-mfma'],
        avx512: ['-DNN_BUILD_AVX512', '-mavx512f', '-mavx512dq', '-mavx512bw', '-mavx512vl', '-mfma', '-mprefer-vector-width=512'],
      }
    : { plain: [] };

/** An error that a person can act on; `code` is one of config/errors.ts. */
export class BuildError extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

const sha256 = (...parts) => {
  const hash = createHash('sha256');
  for (const part of parts) hash.update(part).update('\0');
  return hash.digest('hex');
};

/** The first of $CC, cc, gcc, clang that runs; {command, version}. Throws COMPILER_MISSING. */
function findCompiler() {
  const wish = process.env.CC?.trim();
  for (const command of wish ? [wish] : ['cc', 'gcc', 'clang']) {
    const [program, ...first] = command.split(/\s+/);
    const result = spawnSync(program, [...first, '--version'], { encoding: 'utf8' });
    if (result.status === 0) return { program, first, version: result.stdout };
  }
  const tried = wish ? `CC=${wish}` : 'cc, gcc and clang';
  throw new BuildError('COMPILER_MISSING', `no C compiler (tried ${tried}): install one, on Debian with apt-get install gcc libc6-dev`);
}

/** Whether the compiler takes -fopenmp and can link with it. Remembered with the compiler's version. */
function hasOpenMp(compiler) {
  const key = sha256(compiler.program, ...compiler.first, compiler.version);
  const memory = join(outputDirectory, 'compiler.json');
  if (existsSync(memory)) {
    try {
      const known = JSON.parse(readFileSync(memory, 'utf8'));
      if (known.key === key) return known.openMp;
    } catch (error) {
      if (!(error instanceof SyntaxError)) throw error;
      rmSync(memory); // cut short by an interrupted build: probe again
    }
  }
  const probe = join(outputDirectory, `probe-${process.pid}`);
  writeFileSync(`${probe}.c`, '#include <omp.h>\nint nn_probe(void) { return omp_get_max_threads(); }\n');
  const arguments_ = [...compiler.first, '-fopenmp', '-fPIC', ...linkFlags, '-o', probe, `${probe}.c`];
  const openMp = spawnSync(compiler.program, arguments_, { stdio: 'ignore' }).status === 0;
  rmSync(`${probe}.c`);
  rmSync(probe, { force: true });
  writeFileSync(memory, JSON.stringify({ key, openMp }));
  return openMp;
}

/** Every compilation there is to do: [{source, object, flags}], the object's name telling what it is made of. */
function planObjects(compiler, openMp) {
  const flags = [...commonFlags, ...(openMp ? ['-fopenmp'] : [])];
  const headers = [sourceDirectory, includeDirectory]
    .flatMap((directory) => readdirSync(directory).filter((name) => name.endsWith('.h')).map((name) => join(directory, name)))
    .sort((a, b) => (a < b ? -1 : 1));
  const common = sha256(compiler.program, ...compiler.first, compiler.version, ...headers.map((path) => readFileSync(path)));
  const plan = [];
  for (const name of readdirSync(sourceDirectory).filter((file) => file.endsWith('.c')).sort()) {
    const source = join(sourceDirectory, name);
    const text = readFileSync(source, 'utf8');
    const own = text.includes('build: -ffp-contract=off') ? ['-ffp-contract=off'] : [];
    const sets = name.endsWith('.simd.c') ? Object.entries(instructionSets) : Object.entries({ base: [] });
    for (const [set, setFlags] of sets) {
      const all = [...flags, ...own, ...setFlags];
      const hash = sha256(common, text, ...all).slice(0, 16);
      plan.push({ source, flags: all, object: join(objectDirectory, `${name.replace(/(\.simd)?\.c$/, '')}-${set}-${hash}.o`) });
    }
  }
  return plan;
}

/** Runs a program; its output, or a BuildError with what it printed. */
function run(program, arguments_) {
  return new Promise((resolve, reject) => {
    execFile(program, arguments_, { encoding: 'utf8', timeout: compileTimeoutMs, maxBuffer: 64 << 20 }, (error, stdout, stderr) => {
      if (error) reject(new BuildError('LIBRARY_INVALID', `${program} failed: ${arguments_.at(-1)}\n${stderr || error.message}`));
      else resolve(stdout + stderr);
    });
  });
}

/** Runs the jobs, as many at once as there are cores. */
async function inParallel(jobs, work) {
  const queue = [...jobs];
  const lane = async () => {
    for (let job = queue.shift(); job !== undefined; job = queue.shift()) await work(job);
  };
  await Promise.all(Array.from({ length: Math.min(queue.length, availableParallelism()) }, lane));
}

async function buildCpu(say) {
  const library = join(outputDirectory, `libnn_cpu.${extension}`);
  mkdirSync(objectDirectory, { recursive: true });
  const compiler = findCompiler();
  const openMp = hasOpenMp(compiler);
  const plan = planObjects(compiler, openMp);
  const objects = plan.map(({ object }) => object);
  const stampFile = `${library}.stamp`;
  const stamp = sha256(...objects, ...linkFlags);
  if (existsSync(library) && existsSync(stampFile) && readFileSync(stampFile, 'utf8') === stamp) return { library, built: false };

  const missing = plan.filter(({ object }) => !existsSync(object));
  say(`native: compiling ${missing.length} of ${plan.length} objects with ${compiler.version.split('\n')[0]}`);
  if (!openMp) say('native: this compiler has no OpenMP, the library will use one thread');
  await inParallel(missing, async ({ source, object, flags }) => {
    const temporary = `${object}.${process.pid}`;
    const warnings = await run(compiler.program, [...compiler.first, ...flags, '-c', '-o', temporary, source]);
    if (warnings.trim() !== '') say(warnings.trim());
    renameSync(temporary, object);
  });
  const temporary = `${library}.${process.pid}`;
  await run(compiler.program, [...compiler.first, ...linkFlags, ...(openMp ? ['-fopenmp'] : []), '-o', temporary, ...objects, '-lm']);
  renameSync(temporary, library);
  writeFileSync(stampFile, stamp);
  const current = new Set(objects);
  for (const name of readdirSync(objectDirectory)) {
    const path = join(objectDirectory, name);
    if (name.endsWith('.o') && !current.has(path)) rmSync(path, { force: true });
  }
  say(`native: ${library}`);
  return { library, built: true };
}

const onPath = (program) => (process.env.PATH ?? '').split(delimiter).some((directory) => existsSync(join(directory, program)));

/**
 * cuda/kernels/*.cu to dist/native/libnn_cuda.so, for the targets of CUDA_NN_NVCC_TARGETS (such as 90a; all when unset, and PTX for
 * newer chips). `wanted`: false does nothing; 'auto' does nothing where there is no nvcc; true throws
 * COMPILER_MISSING there.
 */
async function buildCuda(say, wanted) {
  if (wanted === false) return undefined;
  const kernels = existsSync(kernelDirectory) ? readdirSync(kernelDirectory).filter((name) => name.endsWith('.cu')).sort() : [];
  if (kernels.length === 0 || !onPath('nvcc')) {
    if (wanted === true) throw new BuildError('COMPILER_MISSING', kernels.length === 0 ? 'there are no CUDA kernels' : 'no nvcc on the PATH');
    return undefined;
  }
  const library = join(outputDirectory, 'libnn_cuda.so');
  const targets = (process.env.CUDA_NN_NVCC_TARGETS ?? '80,86,89,90a').split(',').map((sm) => `-gencode=arch=compute_${sm},code=sm_${sm}`);
  const newer = process.env.CUDA_NN_NVCC_TARGETS === undefined ? ['-gencode=arch=compute_90,code=compute_90'] : [];
  const flags = ['-std=c++17', '-O3', '-Xcompiler', '-fPIC,-fvisibility=hidden', ...targets, ...newer];
  const version = spawnSync('nvcc', ['--version'], { encoding: 'utf8' }).stdout;
  const headers = [kernelDirectory, includeDirectory].flatMap((directory) =>
    readdirSync(directory).filter((name) => /\.(h|cuh)$/.test(name)).sort().map((name) => join(directory, name)),
  );
  const common = sha256(version, ...flags, ...headers.map((path) => readFileSync(path)));
  const plan = kernels.map((name) => {
    const source = join(kernelDirectory, name);
    const text = readFileSync(source, 'utf8');
    const all = text.includes('build: -fmad=false') ? [...flags, '-fmad=false'] : flags;
    return { source, flags: all, object: join(objectDirectory, 'cuda', `${name.slice(0, -3)}-${sha256(common, text, ...all).slice(0, 16)}.o`) };
  });
  const stamp = sha256(...plan.map(({ object }) => object));
  const stampFile = `${library}.stamp`;
  if (existsSync(library) && existsSync(stampFile) && readFileSync(stampFile, 'utf8') === stamp) return { library, built: false };
  mkdirSync(join(objectDirectory, 'cuda'), { recursive: true });
  const missing = plan.filter(({ object }) => !existsSync(object));
  say(`native: compiling ${missing.length} of ${plan.length} CUDA objects with nvcc`);
  await inParallel(missing, async ({ source, flags: all, object }) => {
    const temporary = `${object}.${process.pid}`;
    await run('nvcc', [...all, '-c', '-o', temporary, source]);
    renameSync(temporary, object);
  });
  const temporary = `${library}.${process.pid}`;
  await run('nvcc', ['-shared', ...targets, '-Xlinker', '-z,nodelete', '-o', temporary, ...plan.map(({ object }) => object)]);
  renameSync(temporary, library);
  writeFileSync(stampFile, stamp);
  const current = new Set(plan.map(({ object }) => object));
  for (const name of readdirSync(join(objectDirectory, 'cuda'))) {
    const path = join(objectDirectory, 'cuda', name);
    if (name.endsWith('.o') && !current.has(path)) rmSync(path);
  }
  say(`native: ${library}`);
  return { library, built: true };
}

/**
 * Builds what is not up to date and says so on stderr unless `quiet`. `cuda`: false, 'auto' (where there is an nvcc) or true.
 * Returns {cpu, cuda}, each {library, built} (cuda undefined where it was not built). Throws BuildError: COMPILER_MISSING, or LIBRARY_INVALID with the compiler's own words.
 */
export async function buildNative({ quiet = false, cuda = false } = {}) {
  const say = (line) => {
    if (!quiet) process.stderr.write(`${line}\n`);
  };
  return { cpu: await buildCpu(say), cuda: await buildCuda(say, cuda) };
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const flags = new Set(process.argv.slice(2));
  try {
    await buildNative({ quiet: flags.has('--quiet'), cuda: flags.has('--cuda') });
  } catch (error) {
    if (!(error instanceof BuildError)) throw error;
    process.stderr.write(`${error.code}: ${error.message}\n`);
    process.exitCode = 4;
  }
}
