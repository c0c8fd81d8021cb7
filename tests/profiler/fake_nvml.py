"""The module pynvml over GPUs that are none: dicts of answers, any of which may be an error."""

from types import SimpleNamespace

import pynvml

H100 = {
    "nvmlDeviceGetUUID": "GPU-aaaa1111-0000",
    "nvmlDeviceGetName": "NVIDIA H100 (fake)",
    "nvmlDeviceGetCudaComputeCapability": (9, 0),
    "nvmlDeviceGetNumGpuCores": 16896,
    "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=80 * 2**30),
    "nvmlDeviceGetPowerManagementLimit": 700_000,
    "nvmlDeviceGetMaxClockInfo": {pynvml.NVML_CLOCK_SM: 1980, pynvml.NVML_CLOCK_MEM: 2619},
    "nvmlDeviceGetClockInfo": {pynvml.NVML_CLOCK_SM: 1755},
    "nvmlDeviceGetEccMode": [1, 1],
    "nvmlDeviceGetMigMode": [0, 0],
    "nvmlDeviceIsMigDeviceHandle": pynvml.c_uint(0),
    "nvmlDeviceGetTotalEnergyConsumption": 123_456,
    "nvmlDeviceGetPowerUsage": 250_000,
    "nvmlDeviceGetFieldValues": 310_000,
    "nvmlDeviceGetCurrentClocksThrottleReasons": 0x1,
    "nvmlDeviceGetComputeRunningProcesses": [],
}
SECOND_H100 = H100 | {"nvmlDeviceGetUUID": "GPU-bbbb2222-0000"}
T4 = H100 | {"nvmlDeviceGetUUID": "GPU-cccc3333-0000", "nvmlDeviceGetName": "Tesla T4 (fake)"}


def failing(code: int) -> pynvml.NVMLError:
    return pynvml.NVMLError(code)


class FakeNvml:
    """The module pynvml over GPUs given as dicts of answers; an answer may be an NVMLError."""

    def __init__(self, *gpus: dict, init: pynvml.NVMLError | None = None) -> None:
        self.gpus, self.init = gpus, init

    def __getattr__(self, name: str):
        if not name.startswith("nvmlDevice"):
            return getattr(pynvml, name)

        def call(gpu, *arguments):
            answer = gpu[name]
            if isinstance(answer, Exception):
                raise answer
            return answer[arguments[0]] if isinstance(answer, dict) else answer

        return call

    def nvmlInit(self):
        if self.init is not None:
            raise self.init

    def nvmlSystemGetDriverVersion(self):
        return "570.86.10"

    def nvmlSystemGetCudaDriverVersion_v2(self):
        return 12080

    def nvmlDeviceGetCount(self):
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index):
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        for gpu in self.gpus:
            if gpu["nvmlDeviceGetUUID"] == uuid:
                return gpu
        raise failing(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetFieldValues(self, gpu, fields):
        assert fields == [pynvml.NVML_FI_DEV_POWER_INSTANT]
        answer = gpu["nvmlDeviceGetFieldValues"]
        if isinstance(answer, Exception):
            (value,) = (pynvml.c_nvmlFieldValue_t * 1)()
            value.nvmlReturn = answer.value
            return [value]
        value = pynvml.c_nvmlFieldValue_t(nvmlReturn=pynvml.NVML_SUCCESS)
        value.value.uiVal = answer
        return [value]
