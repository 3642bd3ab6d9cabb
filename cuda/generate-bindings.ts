/**
 * Reads cuda/include/nn.h and writes cuda/bindings.generated.ts: the koffi prototype of every function, the type of a
 * loaded library, and the class `Kernels`, whose methods check each tensor by the parameter comments before they call.
 * A comment that does not follow the grammar at the top of nn.h is an error here, so a kernel without a checked contract
 * cannot exist. Knows nothing of koffi and needs no native library. Run by `npm run generate`; a test compares the result.
 */
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { packageRoot } from '../config/schema.ts';

type Way = 'out' | 'add' | 'inout' | 'in' | 'host';

/** What the comment beside a pointer says. */
interface Contract {
  readonly way: Way;
  readonly type: string;
  /** Elements, as an expression of size arguments in TypeScript and C alike. */
  readonly length: string;
  readonly nullable: boolean;
}

interface Parameter {
  readonly name: string;
  /** The C type without const, `*` included. */
  readonly type: string;
  readonly contract: Contract | null;
}

interface Entry {
  readonly name: string;
  readonly result: string;
  readonly parameters: readonly Parameter[];
  readonly doc: string;
}

const SCALARS = new Set(['int32_t', 'int64_t', 'uint64_t', 'float', 'double', 'nn_dtype']);
const HOST_ARRAYS: Record<string, string> = {
  u8: 'Uint8Array', u16: 'Uint16Array', bf16: 'Uint16Array', i32: 'Int32Array', i64: 'BigInt64Array', u64: 'BigUint64Array', f32: 'Float32Array', f64: 'Float64Array',
};
const POINTEES: Record<string, string> = { float: 'f32', double: 'f64', int32_t: 'i32', int64_t: 'i64', uint64_t: 'u64', uint16_t: 'u16', char: 'u8' };

/** The whole text of bindings.generated.ts for the text of nn.h. Throws an Error that names the function at fault. */
export function generateBindings(header: string): string {
  const entries = parseHeader(header);
  const version = /#define NN_ABI_VERSION (\d+)/.exec(header)?.[1];
  if (version === undefined) throw new Error('nn.h: NN_ABI_VERSION is not defined');
  const kernels = entries.filter(({ parameters }) => parameters.some(({ contract }) => contract !== null && contract.way !== 'host'));
  return `/**
 * Generated from cuda/include/nn.h by cuda/generate-bindings.ts (\`npm run generate\`); not edited by hand. Prototypes of the
 * native library, and the kernels with their tensors checked. device.ts loads the library and makes the Kernels.
 */
import { bytesOf, code, refuse } from './check.ts';
import type { ComputeType, Tensor, TypedArray } from './tensor.ts';

/** The version of the ABI that these bindings speak. */
export const ABI_VERSION = ${version};

/** What koffi binds: device addresses and contexts are numbers, host memory is a pointer. */
export const PROTOTYPES = {
${entries.map((entry) => `  ${entry.name}: '${prototype(entry)}',`).join('\n')}
} as const;

/** The functions of a loaded library. Each returns a status of nn.h, but for nn_abi_version. */
export interface Native {
${entries.map((entry) => `  readonly ${entry.name}: (${entry.parameters.map((parameter) => `${camel(parameter.name)}: ${nativeType(parameter)}`).join(', ')}) => number;`).join('\n')}
}

/** Throws the error that belongs to a status other than NN_OK. */
export type Fail = (kernel: string, status: number) => never;

/** Every kernel of nn.h on one context. A tensor of another type, or too short for the sizes, is a bug: plain Error. */
export class Kernels {
  readonly #native: Native;
  readonly #context: number;
  readonly #fail: Fail;

  constructor(native: Native, context: number, fail: Fail) {
    this.#native = native;
    this.#context = context;
    this.#fail = fail;
  }

${kernels.map(method).join('\n\n')}
}
`;
}

/** Splits nn.h into its functions with their comments. */
function parseHeader(header: string): Entry[] {
  const entries: Entry[] = [];
  const pattern = /(?:\/\*((?:[^*]|\*(?!\/))*)\*\/\n)?NN_API (\w+) (nn_\w+)\(([^;]*)\);/g;
  for (const [, comment, result, name, body] of header.matchAll(pattern)) {
    const doc = (comment ?? '').trim();
    entries.push({ name: name!, result: result!, parameters: parseParameters(name!, body!), doc: doc.startsWith('----') ? '' : doc });
  }
  const declared = header.match(/^NN_API /gm)?.length ?? 0;
  if (declared !== entries.length) throw new Error(`nn.h: ${declared} functions are declared, but ${entries.length} were understood`);
  return entries;
}

function parseParameters(entry: string, body: string): Parameter[] {
  const parameters: Parameter[] = [];
  for (const line of body.split('\n')) {
    const [declarations, comment] = line.split('//') as [string, string?];
    const parts = declarations.split(',').map((part) => part.trim()).filter((part) => part !== '' && part !== 'void');
    for (const part of parts) {
      const match = /^(?:const )?(\w+) (\*?)(\w+)$/.exec(part);
      if (match === null) throw new Error(`nn.h: ${entry}: parameter '${part}' is not understood`);
      const [, type, star, name] = match as unknown as [string, string, string, string];
      parameters.push({ name, type: type + star, contract: comment === undefined ? null : parseContract(entry, name, comment) });
    }
    if (comment !== undefined && parts.length !== 1) throw new Error(`nn.h: ${entry}: a parameter comment belongs beside one parameter`);
  }
  for (const parameter of parameters) checkParameter(entry, parameter, parameters);
  return parameters;
}

function parseContract(entry: string, name: string, comment: string): Contract {
  const match = /^\s*(out|add|inout|in|host) (f32|f64|bf16|i32|i64|u64|u16|u8|dtype|out_dtype|state_dtype) \[([^\]]+)\](, null)?\s*$/.exec(comment);
  if (match === null) throw new Error(`nn.h: ${entry}: the comment of '${name}' does not follow the grammar: ${comment.trim()}`);
  const factors = match[3]!.split(',').map((factor) => factor.trim());
  const length = factors.map((factor) => (factors.length > 1 && /[+-]/.test(factor) && !/^\(.*\)$/.test(factor) ? `(${factor})` : factor)).join(' * ');
  return { way: match[1] as Way, type: match[2]!, length, nullable: match[4] !== undefined };
}

/** Every pointer but the context has a contract, whose type fits the pointer and whose length names size arguments. */
function checkParameter(entry: string, { name, type, contract }: Parameter, all: readonly Parameter[]): void {
  const wrong = (problem: string): never => {
    throw new Error(`nn.h: ${entry}: '${name}' ${problem}`);
  };
  if (contract === null) {
    if (type !== 'nn_context*' && !SCALARS.has(type)) wrong(`has the type ${type} and no comment`);
    return;
  }
  if (!type.endsWith('*')) wrong('has a comment but is no pointer');
  const pointee = type.slice(0, -1);
  if (pointee !== 'void' && POINTEES[pointee] !== contract.type) wrong(`points to ${pointee}, but its comment says ${contract.type}`);
  if (contract.type.endsWith('dtype') && !all.some((each) => each.name === contract.type && each.type === 'nn_dtype')) wrong(`has no argument ${contract.type}`);
  for (const word of contract.length.match(/[A-Za-z_]\w*/g) ?? []) {
    if (!all.some((each) => each.name === word && each.contract === null && SCALARS.has(each.type))) wrong(`has the length ${contract.length}, but there is no argument ${word}`);
  }
}

const camel = (name: string): string => name.replace(/_([a-z0-9])/g, (_, letter: string) => letter.toUpperCase());

const isDevice = ({ contract }: Parameter): boolean => contract !== null && contract.way !== 'host';

function prototype({ name, parameters }: Entry): string {
  const types = parameters.map((parameter) => {
    if (parameter.type === 'nn_context*' || isDevice(parameter)) return `uint64_t ${parameter.name}`;
    if (parameter.contract !== null) return `void *${parameter.name}`;
    return `${parameter.type === 'nn_dtype' ? 'int32_t' : parameter.type} ${parameter.name}`;
  });
  return `int32_t ${name}(${types.length === 0 ? 'void' : types.join(', ')})`;
}

const hostType = ({ type, contract }: Parameter): string => (type === 'void*' ? 'TypedArray' : HOST_ARRAYS[contract!.type]!);

const nativeType = (parameter: Parameter): string => (parameter.contract?.way === 'host' ? hostType(parameter) : 'number');

function methodType(parameter: Parameter): string {
  if (isDevice(parameter)) return parameter.contract!.nullable ? 'Tensor | null' : 'Tensor';
  if (parameter.contract !== null) return hostType(parameter);
  return parameter.type === 'nn_dtype' ? 'ComputeType' : 'number';
}

/** One method: checks in the order of the arguments, then the call. */
function method(entry: Entry): string {
  const kernel = entry.name.replace(/^nn_/, '');
  const parameters = entry.parameters.filter(({ type }) => type !== 'nn_context*');
  const checks = parameters.filter(({ contract }) => contract !== null).map((parameter) => check(kernel, parameter));
  const values = entry.parameters.map((parameter) => {
    const name = camel(parameter.name);
    if (parameter.type === 'nn_context*') return 'this.#context';
    if (isDevice(parameter)) return parameter.contract!.nullable ? `${name} === null ? 0 : ${name}.address` : `${name}.address`;
    return parameter.type === 'nn_dtype' ? `code(${name})` : name;
  });
  const doc = entry.doc === '' ? '' : `  /** ${entry.doc.split('\n').map((line) => line.replace(/^ \* ?/, '')).join('\n   * ')} */\n`;
  const signature = parameters.map((parameter) => `${camel(parameter.name)}: ${methodType(parameter)}`).join(', ');
  return `${doc}  ${camel(kernel)}(${signature}): void {
${checks.join('\n')}
    const status = this.#native.${entry.name}(${values.join(', ')});
    if (status !== 0) this.#fail('${entry.name}', status);
  }`;
}

/** The comparison is written so that a NaN size fails it. Raw bytes (void with u8) may have any type. */
function check(kernel: string, parameter: Parameter): string {
  const contract = parameter.contract!;
  const name = camel(parameter.name);
  const length = contract.length.replace(/[A-Za-z_]\w*/g, camel).replace(/ *([*/+-]) */g, ' $1 ');
  const raw = contract.type === 'u8' && parameter.type === 'void*';
  if (contract.way === 'host') {
    const size = raw ? `${name}.byteLength` : `${name}.length`;
    return `    if (!(${size} >= ${length})) refuse('${kernel}', '${name}', ${name}, 'host ${contract.type}', ${length});`;
  }
  const type = contract.type.endsWith('dtype') ? camel(contract.type) : `'${contract.type}'`;
  const condition = raw ? `!(bytesOf(${name}) >= ${length})` : `${name}.dtype !== ${type} || !(${name}.length >= ${length})`;
  const wanted = contract.nullable ? `${name} !== null && (${condition})` : condition;
  return `    if (${wanted}) refuse('${kernel}', '${name}', ${name}, ${raw ? "'u8'" : type}, ${length});`;
}

if (process.argv[1] !== undefined && import.meta.url === pathToFileURL(process.argv[1]).href) {
  const root = packageRoot();
  const target = join(root, 'cuda', 'bindings.generated.ts');
  writeFileSync(target, generateBindings(readFileSync(join(root, 'cuda', 'include', 'nn.h'), 'utf8')));
  process.stderr.write(`wrote ${target}\n`);
}
