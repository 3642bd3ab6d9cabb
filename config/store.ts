/**
 * The protocol of the store: how workers without the orchestrator's file system get the files of a run and deliver its
 * checkpoints over the HTTP API. Files are named by run, role and sha-256, never by path. Pure; spoken by
 * orchestrator/server/store.ts and workers/store-client.ts.
 *
 *   GET   /store                                     {protocol}
 *   GET   /store/runs/:run                           {paths}: where each role lies on the orchestrator's host
 *   GET   /store/runs/:run/:role                     200 Listing | 202 {hashing}: ask again
 *   GET   /store/runs/:run/:role/:sha256             the file's bytes; Range: bytes=N-
 *   PUT   /store/runs/:run/:role/upload              {epoch, manifest} -> {upload, state}: begins or joins the delivery of a checkpoint
 *   HEAD  /store/runs/:run/:role/upload/:id/:sha256  upload-offset: bytes that are there
 *   PATCH /store/runs/:run/:role/upload/:id/:sha256  upload-offset: N, and bytes from there on
 *   POST  /store/runs/:run/:role/upload/:id          verify and name: {state}
 */
import { z } from 'zod';
import { parseCheckpointName } from './branches.ts';
import type { CheckpointName } from './branches.ts';

export const STORE_PROTOCOL = 1;

/** The files that a run has. `train`, `validation` and `tokenizer` are single files; `initial` and `step-<n>` (branches.ts) checkpoint directories. */
export type Role = 'train' | 'validation' | 'tokenizer' | 'initial' | CheckpointName;

const ROLE = /^(train|validation|tokenizer|initial)$/;

/** The role of that name, or null. */
export const roleOf = (name: string): Role | null => (ROLE.test(name) || parseCheckpointName(name) !== null ? (name as Role) : null);

/** Whether the role is that of a checkpoint. */
export const isCheckpoint = (role: Role): role is CheckpointName => parseCheckpointName(role) !== null;

/** The name of the one file of `train`, `validation` and `tokenizer`. */
export const SINGLE = 'contents';

/** What a checkpoint directory may hold: no other name is read, sent, taken or made. */
const NAME = /^(contents|(config|generation_config|tokenizer|tokenizer_config|manifest|model\.safetensors\.index|training\/state)\.json|(training\/)?[\w-]+(\.[\w-]+)*\.safetensors)$/;

export const isListedName = (name: string): boolean => NAME.test(name);

const sha256 = z.string().regex(/^[0-9a-f]{64}$/, 'must be a sha-256 in hex');
const files = z.record(z.string().max(200).regex(NAME), z.strictObject({ bytes: z.int().nonnegative(), sha256 })).refine((all) => Object.keys(all).length <= 4096);

/** What a role holds: each file's size and sha-256. `path` is its place on the orchestrator's host, for people and comparison. */
export const listing = z.strictObject({ path: z.string(), files });
export type Listing = z.output<typeof listing>;
export type ListedFiles = Listing['files'];

export const hashing = z.strictObject({ hashing: z.literal(true) });
export const greeting = z.strictObject({ protocol: z.literal(STORE_PROTOCOL) });
export const runPaths = z.strictObject({ paths: z.record(z.string(), z.string()), checkpoints: z.string() });
export type RunPaths = z.output<typeof runPaths>;

/** Begins a delivery: `epoch` is that of the job, so that one that was given up cannot deliver any more. */
export const beginUpload = z.strictObject({ epoch: z.int().nonnegative(), manifest: z.strictObject({ version: z.literal(1), files }) });
export type UploadState = 'open' | 'verifying' | 'complete';
export const uploadState = z.strictObject({ upload: z.string().regex(/^[0-9a-f]{32}$/), state: z.enum(['open', 'verifying', 'complete']) });

/** Header of HEAD and PATCH: bytes of the file that the store has. */
export const OFFSET_HEADER = 'upload-offset';
