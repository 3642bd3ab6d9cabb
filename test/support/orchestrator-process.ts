/**
 * An orchestrator in a process of its own, so that a test can kill it: forked with the settings as JSON in argv[2]; says
 * `ready` to its parent, and ends with it. `NN_TEST_LOG` sets the level of its log on stderr.
 */
import { pino } from 'pino';
import { loadConfig } from '../../config/schema.ts';
import { startOrchestrator } from '../../orchestrator/main.ts';

process.on('disconnect', () => process.exit(0));
const logger = pino({ level: process.env['NN_TEST_LOG'] ?? 'silent' }, process.stderr);
await startOrchestrator({ config: loadConfig(JSON.parse(process.argv[2]!) as object), logger });
process.send!('ready');
