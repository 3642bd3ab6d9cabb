/** Whether tests can have a GPU here, and why not. Used by every suite that needs one. */
import { errorCode } from '../../config/errors.ts';
import { describeDevices, whyNoDevice } from '../../cuda/device.ts';

/** Undefined where the CUDA library is built and finds a GPU. */
export function whyNoGpu(): string | undefined {
  try {
    return describeDevices('cuda').length > 0 ? undefined : `the CUDA library finds no GPU: ${whyNoDevice('cuda')}`;
  } catch (error) {
    if (!['LIBRARY_INVALID', 'DEVICE_UNAVAILABLE'].includes(errorCode(error) ?? '')) throw error;
    return (error as Error).message;
  }
}
